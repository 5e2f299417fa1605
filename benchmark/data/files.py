"""Image files: decoded, resized and cropped as the data set declares, never otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from robench.benchmark.data.registry import Request
from robench.benchmark.data.streams import Bytes
from robench.errors import UsageError, one_line

# Those of torchvision's ImageFolder: what it reads is read here, and nothing is left out.
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
GREY, COLOR = ("1", "L"), ("P", "RGB")
Labels = npt.NDArray[np.int64]
INTERPOLATIONS = ("bilinear", "bicubic")  # of Pillow, which smooths where it makes smaller


@dataclass(frozen=True)
class Look:
    """What becomes of an image.

    Attributes:
        size: height and width of what comes out; another is an error.
        channels: 1, or 3 with grey images as three equal channels.
        resize: the shorter side becomes this long, the other is rounded down.
        crop: the square of this size in the middle is taken after that.
        modes: of Pillow, that are accepted.
    """

    size: int
    channels: int = 3
    resize: int | None = None
    crop: int | None = None
    interpolation: str = "bilinear"
    modes: tuple[str, ...] = GREY + COLOR

    @classmethod
    def asked(cls, request: Request, resize: int | None, crop: int | None, **more: Any) -> Look:
        """With the options of a request, or these. `size` is 0 where they do not tell it."""
        resize, crop = request.number("resize", resize), request.number("crop", crop)
        how = request.choice("interpolation", INTERPOLATIONS)
        if resize is None and "interpolation" in request.options:
            raise UsageError(f"{request.kind}: interpolation belongs to resize=N")
        if resize is not None and crop is not None and crop > resize:
            raise UsageError(f"{request.kind}: cannot crop {crop} of {resize} pixels")
        return cls(crop or resize or 0, resize=resize, crop=crop, interpolation=how, **more)

    def __call__(self, file: str) -> Bytes:
        """(C, H, W). Raises UsageError for what is damaged or does not fit."""
        from PIL import Image

        try:
            with Image.open(file) as image:
                _check_mode(file, image.mode, self.modes)
                found = self._cut(file, image.convert("L" if image.mode in GREY else "RGB"))
                pixels = np.asarray(found).reshape(found.height, found.width, -1)
        except UsageError:
            raise
        except Exception as error:  # damaged bytes may raise anything in a decoder
            raise UsageError(f"cannot read {file} ({one_line(error)})") from error
        if found.size != (self.size, self.size):
            raise UsageError(f"{file} is {found.width}x{found.height}, not {self.size}x{self.size}"
                             ": add ,resize=N,crop=N to the name of the data set")
        wide = np.broadcast_to(pixels, (*pixels.shape[:2], self.channels))
        return np.ascontiguousarray(wide.transpose(2, 0, 1))

    def _cut(self, file: str, image: Any) -> Any:
        if self.resize is None and self.crop is None:
            return image
        from torchvision.transforms import InterpolationMode  # type: ignore[import-untyped]
        from torchvision.transforms import functional as transform

        if self.resize is not None:
            image = transform.resize(image, self.resize, InterpolationMode(self.interpolation))
        if self.crop is not None:
            if min(image.size) < self.crop:  # torchvision would add a black frame
                raise UsageError(f"{file} is {image.width}x{image.height}: cannot crop "
                                 f"{self.crop} pixels; add ,resize=N")
            image = transform.center_crop(image, self.crop)
        return image


@dataclass(frozen=True)
class Files:
    """Files of images as a source."""

    files: tuple[str, ...]
    look: Look

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.look.channels, self.look.size, self.look.size

    def read(self, rows: Sequence[int]) -> Bytes:
        return np.stack([self.look(self.files[row]) for row in rows])


def grouped(groups: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], Labels, Labels]:
    """(files, group of each, a random order) of groups of files, one for each class.

    They lie sorted by class; in that order, which is always the same, the first n are a fair
    sample. Labels (N,) and order (N,) are int64.
    """
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    order = np.random.RandomState(0).permutation(len(labels))
    return tuple(file for group in groups for file in group), labels, order


def headers(files: Sequence[str]) -> list[tuple[tuple[int, int], str]]:
    """((width, height), mode) of each, without decoding them."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor() as pool:
        return list(pool.map(_header, files, chunksize=64))


def _header(file: str) -> tuple[tuple[int, int], str]:
    from PIL import Image

    try:
        with Image.open(file) as image:
            found = image.size, image.mode
    except Exception as error:
        raise UsageError(f"cannot read {file} ({one_line(error)})") from error
    _check_mode(file, found[1], GREY + COLOR)
    return found


def _check_mode(file: str, mode: str, known: tuple[str, ...]) -> None:
    if mode not in known:
        raise UsageError(f"{file} has the mode {mode}: save it as 8-bit grey or RGB, without "
                         "transparency")


def by_class(split: Path) -> dict[str, list[str]]:
    """Class name -> its image files, in folders within it, too; both sorted by name."""
    if not split.is_dir():
        raise UsageError(f"no folder {split}: images go to {split}/<class>/")
    found = {
        group.name: sorted(str(f) for f in group.rglob("*")
                           if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
        for group in sorted(split.iterdir())
        if group.is_dir() and not group.name.startswith(".")
    }
    if not found:
        raise UsageError(f"no class folders in {split}: images go to {split}/<class>/")
    for group, files in found.items():
        if not files:
            raise UsageError(f"no images ({', '.join(sorted(SUFFIXES))}) in {split / group}")
    return found
