"""The gallery: images before and after an attack, as a table and as figures."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from robench.errors import RobenchError, one_line
from robench.reports.columns import make_frame
from robench.reports.record import Gallery, Picture
from robench.reports.store import Results
from robench.reports.style import PALETTE, Drawing, house_style, shorten
from robench.reports.surveys import identity, survey_labels
from robench.reports.text import NOTHING, Board, Cell, Column, percent

Pixels = npt.NDArray[np.uint8]
WIDE = 8  # images side by side; more go on below
ROWS = 3  # clean image, perturbation, adversarial example
COLORS = {True: PALETTE[1], False: PALETTE[0]}  # of what is written under a fooled image or another
COLUMNS = ("dataset", "split", "threat", "attack", "model", "recipe", "defense", "label",
           "checkpoint", "seed", "source", "image", "true_name", "predicted_name", "fooled",
           "clean_confidence", "confidence", "distance")


def pictures(results: Results) -> pd.DataFrame:
    """A line for each image of each gallery.

    `true_name` is also what the clean image is taken for, `predicted_name` what the exact
    adversarial example is; confidences are softmax probabilities of these predictions in [0, 1],
    `distance` is in the norm of the threat model, `image` the place in the test set.
    """
    labels = _labels(results)
    return make_frame([
        {**gallery.model_dump(include=set(COLUMNS)), **picture.model_dump(include=set(COLUMNS)),
         "label": label, "true_name": name_of(gallery, picture.label),
         "predicted_name": name_of(gallery, picture.predicted)}
        for gallery, label in zip(results.galleries, labels, strict=True)
        for picture in gallery.pictures
    ], COLUMNS)


def picture_boards(results: Results) -> list[Board]:
    """A board for each gallery."""
    return [_board(gallery, label)
            for gallery, label in zip(results.galleries, _labels(results), strict=True)]


def draw_pictures(results: Results) -> Iterator[Drawing]:
    """A figure for each gallery. Raises RobenchError for a sheet that cannot be read."""
    for gallery, label in zip(results.galleries, _labels(results), strict=True):
        title, change = _title(gallery, label), 255 * gallery.scale
        scale = (f", times {0.5 / gallery.scale:.3g}: gray is no change, black to white is "
                 f"-{change:.3g}/255 to +{change:.3g}/255" if gallery.scale else ": nothing")
        yield Drawing(
            f"gallery {title}",
            f"{title}. Above, images that are classified right; in the middle, what was added"
            f"{scale}; below, the adversarial examples; where an image withstands, that is where "
            "the attack ended. With the predictions of the exact examples, in fp32, and their "
            "softmax probabilities: the pictures are rounded to 8 bits, in which a network may see "
            "something else.",
            "; ".join(f"{name_of(gallery, p.label)} "
                      + (f"taken for {name_of(gallery, p.predicted)}" if p.fooled else "withstands")
                      for p in gallery.pictures),
            contact_sheet(gallery, title),
        )


def name_of(gallery: Gallery, label: int) -> str:
    """The name of a class, its number where it has none."""
    if label < 0:
        return "nothing"
    return gallery.classes[label] if label < len(gallery.classes) else str(label)


def read_sheet(gallery: Gallery) -> Pixels:
    """(n, 3, H, W, C): of each picture the clean image, the scaled perturbation and x_adv.

    Raises RobenchError if the bytes are not those of such a sheet.
    """
    c, h, w = gallery.shape
    try:
        with Image.open(io.BytesIO(gallery.sheet), formats=("PNG",)) as image:
            if (image.size, image.mode) != ((ROWS * w, gallery.n * h), "L" if c == 1 else "RGB"):
                raise ValueError(f"{image.mode} of {image.size} pixels")
            pixels = np.asarray(image)
    except Exception as error:  # damaged bytes may raise anything in a decoder
        raise RobenchError(f"cannot read the pictures of the gallery of {gallery.source}: "
                           f"{one_line(error)}") from None
    return pixels.reshape(gallery.n, h, ROWS, w, c).transpose(0, 2, 1, 3, 4)


@house_style()
def contact_sheet(gallery: Gallery, title: str) -> Figure:
    """Images in columns: clean, perturbation, adversarial, with the predictions in words."""
    bands, columns = math.ceil(gallery.n / WIDE), min(WIDE, gallery.n)
    figure = Figure(figsize=(1.15 * columns + 1.1, 4.5 * bands + 0.4), layout="constrained")
    panels = figure.subplots(ROWS * bands, columns, squeeze=False)
    factor = f"× {0.5 / gallery.scale:.3g}" if gallery.scale else "none"
    for i, (picture, images) in enumerate(zip(gallery.pictures, read_sheet(gallery), strict=True)):
        band, column = divmod(i, WIDE)
        places = [panels[ROWS * band + row, column] for row in range(ROWS)]
        for axes, pixels in zip(places, images, strict=True):
            _show(axes, pixels)
        if column == 0:
            for axes, what in zip(places, ("clean", f"perturbation\n{factor}", "adversarial"),
                                  strict=True):
                axes.set_ylabel(what)
        places[0].set_title(_said(gallery, picture.label, picture.clean_confidence), fontsize=9)
        places[-1].set_xlabel(
            _said(gallery, picture.predicted, picture.confidence)
            + ("\nfooled" if picture.fooled else "\nwithstands"),
            fontsize=9, color=COLORS[picture.fooled])
    for axes in panels.flat:
        if not axes.images:
            axes.set_visible(False)
    figure.suptitle(shorten(title, 12 * columns + 10), fontsize=11)
    return figure


def _show(axes: Axes, pixels: Pixels) -> None:
    """Pixel for pixel, whatever the size."""
    grey = pixels.shape[2] == 1
    axes.imshow(pixels[:, :, 0] if grey else pixels, cmap="gray" if grey else None, vmin=0,
                vmax=255, interpolation="none")
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _said(gallery: Gallery, label: int, confidence: float) -> str:
    name = shorten(name_of(gallery, label), 14)
    return f"{name}\n{100 * confidence:.0f} %" if math.isfinite(confidence) else f"{name}\n"


def _board(gallery: Gallery, label: str) -> Board:
    some = gallery.pictures
    return Board(
        _title(gallery, label),
        (_column("Image", [Cell(str(p.image)) for p in some]),
         _names("Class", gallery, [p.label for p in some]),
         _column("Confidence, clean %", [_confidence(p.clean_confidence) for p in some]),
         _names("Taken for", gallery, [p.predicted for p in some]),
         _column("Confidence %", [_confidence(p.confidence) for p in some]),
         Column("Outcome", tuple(Cell("fooled" if p.fooled else "withstands") for p in some),
                words=True),
         _column(f"Distance, {gallery.threat.partition(':')[0]}", [_distance(p) for p in some])),
        (f"{sum(p.fooled for p in some)} of {gallery.n} images are fooled",
         f"Attack seed {gallery.attack_seed}", f"Network: {gallery.source}, "
         f"sha256 {gallery.weights_sha256[:12]}", f"Images: sha256 {gallery.data_sha256[:12]}"),
        facets=({"dataset": gallery.dataset, "threat": gallery.threat, "model": gallery.model,
                 "recipe": gallery.recipe},) * gallery.n,
    )


def _title(gallery: Gallery, label: str) -> str:
    network = ", ".join(part for part in (label, gallery.checkpoint) if part)
    return (f"{gallery.dataset} {gallery.split}, {gallery.threat}, {gallery.attack}, {network}, "
            f"seed {gallery.seed}")


def _labels(results: Results) -> list[str]:
    """The label of the defense of each gallery."""
    labels = survey_labels(results.galleries, results.records)
    return [labels[identity(gallery)] for gallery in results.galleries]


def _column(title: str, cells: Sequence[Cell]) -> Column:
    return Column(title, tuple(cells))


def _names(title: str, gallery: Gallery, labels: Sequence[int]) -> Column:
    return Column(title, tuple(Cell(name_of(gallery, label)) for label in labels), words=True)


def _confidence(value: float) -> Cell:
    return Cell(percent(100 * value, 1) if math.isfinite(value) else NOTHING)


def _distance(picture: Picture) -> Cell:
    return Cell(f"{picture.distance:.4g}")
