"""gallery: what an attack makes of the first images that a network gets right."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import robench
from robench.attacks.base import Attack
from robench.attacks.memory import Batches
from robench.attacks.prepare import clean_logits
from robench.attacks.search import Pooled, Search
from robench.attacks.threat import ThreatModel
from robench.attacks.union import Union
from robench.attacks.verify import full_precision, verify
from robench.benchmark.data import Images
from robench.benchmark.evaluate import BATCH, attack_config
from robench.benchmark.kept import kept_survey
from robench.benchmark.sources import Network
from robench.benchmark.spec import RunSpec, digest
from robench.benchmark.surveys import Bench, write
from robench.errors import RobenchError, UsageError, one_line
from robench.files import write_atomic
from robench.randomness import seeded
from robench.reports.record import PICTURES, PIXELS, Gallery, Picture
from robench.reports.store import Results


def galleries(
    sources: Sequence[str], spec: RunSpec, images: int, *, zoo: Path = Path("models"),
    quiet: bool = True,
) -> Results:
    """Attack so many images that each network gets right, the first of the test set, with the first
    attack of `spec`, and write the reports to `spec.out`.

    An attack of robench with the same seed finds the very examples that `eval` counts, but for the
    rounding of other batches. Sources are given as for `eval`, or as runs. Finished networks are
    taken as they are. Other results in the folder stay. Returns all that the folder holds. Raises
    like `eval`, and RobenchError for a network that gets nothing right and an attack that fails.
    """
    if not 1 <= images <= PICTURES:
        raise UsageError(f"--images {images}: a gallery shows 1 to {PICTURES}")
    bench = Bench.create(sources, spec, zoo=zoo, quiet=quiet)
    matrix = bench.matrix
    if isinstance(matrix.attacks[0].build(matrix.threat), Union):
        raise UsageError(f"{spec.attacks[0].label} has several threat models: a gallery shows one")
    if images * matrix.test.x.shape[2:].numel() > PIXELS:
        raise UsageError(f"--images {images}: that is too many of this size, ask for fewer")
    found = (_gallery(network, bench, images) for network in bench.networks)
    return write(spec.out, "galleries", found, _identity)


def _gallery(network: Network, bench: Bench, count: int) -> Gallery:
    """The gallery of one network, computed or taken from an earlier run."""
    matrix, subject = bench.matrix, bench.subject(network, "gallery")
    spec, seed = matrix.attacks[0], matrix.spec.seeds[0]
    attack, classes = spec.build(matrix.threat), matrix.dataset.classes
    rows = first_right(network.net, bench.images, count, matrix.device)
    if not len(rows):
        raise RobenchError(f"{network.source} gets no image of the test set right: there is "
                           "nothing to show")
    data = bench.images.select(rows)
    how: dict[str, Any] = {
        "threat": str(matrix.threat), "attack": spec.label, "attack_seed": seed,
        "attack_config": attack_config(attack, len(classes)), "data_sha256": data.sha256(),
        "weights_sha256": subject.weights, "shape": tuple(data.x.shape[1:]),
    }
    name = digest({**how, "network": [network.source, network.model], "images": rows.tolist(),
                   "robench": robench.__version__})
    path = subject.folder / f"gallery-{name}.json"
    gallery = kept_survey(path, Gallery, subject.fingerprint)
    if gallery is not None:
        return gallery.model_copy(update=subject.facts)
    label = f"{network.source}: {spec.label} at {matrix.threat} on {len(data)} images"
    began = time.perf_counter()
    with matrix.reporter.task(label):
        try:
            shown = attacked(network.net, attack, data.to(matrix.device), matrix.threat, seed,
                             spec.label)
        except RobenchError:
            raise
        except Exception as error:  # third-party attacks raise whatever they like
            raise RobenchError(f"{network.source}, {spec.label}: {one_line(error)}") from error
    gallery = Gallery(
        **{**replace(bench, images=data).survey(subject), **how}, classes=classes,
        seconds=time.perf_counter() - began, pictures=shown.pictures(rows, data.y),
        scale=shown.scale, sheet=shown.sheet(),
    )
    write_atomic(path, gallery.model_dump_json(indent=1) + "\n")
    return gallery


def first_right(net: nn.Module, data: Images, count: int, device: torch.device) -> Tensor:
    """(M,) int64 places of the first images that are classified right, M <= count."""
    found: list[int] = []
    for start in range(0, len(data), BATCH):
        x, y = data.x[start:start + BATCH].to(device), data.y[start:start + BATCH].to(device)
        right = (clean_logits(net, x).argmax(1) == y).nonzero().flatten()
        found += (right + start).tolist()
        if len(found) >= count:
            break
    return torch.tensor(found[:count], dtype=torch.int64)


@dataclass(frozen=True)
class Attacked:
    """Images before and after an attack.

    Attributes:
        x, x_adv: (N, C, H, W) float in [0, 1]; x_adv is inside the threat model always.
        predicted: (N,) int64 of x_adv in fp32, -1 where the logits are not finite.
        clean_confidence, confidence: (N,) softmax probabilities of the predictions.
        fooled: (N,) bool. distance: (N,) in the norm of the threat model.
    """

    x: Tensor
    x_adv: Tensor
    predicted: Tensor
    clean_confidence: Tensor
    confidence: Tensor
    fooled: Tensor
    distance: Tensor

    @property
    def scale(self) -> float:
        """The largest change of a pixel."""
        return float((self.x_adv - self.x).abs().max())

    def sheet(self) -> bytes:
        """The PNG that `Gallery` describes."""
        change = (self.x_adv - self.x) / (self.scale or 1.0)
        columns = [255 * self.x, 128 + 127 * change, 255 * self.x_adv]
        pixels = torch.stack(columns, 1).round().clamp(0, 255).byte()  # (N, 3, C, H, W)
        n, _, c, h, w = pixels.shape
        rows = pixels.permute(0, 3, 1, 4, 2).reshape(n * h, 3 * w, c).cpu().numpy()
        buffer = io.BytesIO()
        Image.fromarray(rows[:, :, 0] if c == 1 else rows).save(buffer, "PNG", optimize=True)
        return buffer.getvalue()

    def pictures(self, rows: Tensor, y: Tensor) -> tuple[Picture, ...]:
        """Given the places (N,) of the images in the test set and their labels (N,)."""
        numbers = (rows, y, self.clean_confidence, self.predicted, self.confidence, self.fooled,
                   self.distance)
        names = ("image", "label", "clean_confidence", "predicted", "confidence", "fooled",
                 "distance")
        return tuple(Picture(**dict(zip(names, one, strict=True)))
                     for one in zip(*(tensor.tolist() for tensor in numbers), strict=True))


def attacked(
    net: nn.Module, attack: Attack, data: Images, threat: ThreatModel, seed: int, label: str
) -> Attacked:
    """Attack images that are right when clean. What an attack returns outside the threat model is
    shown as the clean image: it counts for nothing."""
    data = data.held()
    x, y = data.x, data.y
    if isinstance(attack, Pooled):
        x_adv = Search(attack, net, x, y, seed=seed).run().x_adv
    else:
        with seeded(seed, "attack", label, 0), full_precision():
            x_adv = Batches(len(x))(lambda x, y: attack(net, x, y), x, y)
    outside = verify(net, x, x_adv, y, threat).outside
    x_adv = torch.where(outside[:, None, None, None], x, x_adv)
    verdict = verify(net, x, x_adv, y, threat)
    return Attacked(
        x, x_adv, verdict.predicted, _confidence(net, x, y),
        _confidence(net, x_adv, verdict.predicted), verdict.fooled, verdict.distance,
    )


def _confidence(net: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    """(N,) the softmax probability of a class for each image; NaN for -1."""
    chances = clean_logits(net, x).double().softmax(1)
    mine = chances.gather(1, label.clamp_min(0)[:, None])[:, 0]
    return mine.where(label >= 0, math.nan)


def _identity(gallery: Gallery) -> tuple[Any, ...]:
    """What a later gallery replaces."""
    return (gallery.source, gallery.weights_sha256, gallery.threat, gallery.attack,
            gallery.data_sha256, gallery.attack_seed)
