"""What a plan must know of a data set: its shape and its hash, but no image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from robench.benchmark.data import DATASETS, Dataset, load_dataset
from robench.benchmark.data.registry import Request
from robench.benchmark.spec import CellSpec, RunSpec

# training images, test images, classes, channels, size: of data sets that may lie elsewhere
SHAPES = {
    "mnist": (60_000, 10_000, 10, 1, 28),
    "fashion-mnist": (60_000, 10_000, 10, 1, 28),
    "svhn": (73_257, 26_032, 10, 3, 32),
    "cifar10": (50_000, 10_000, 10, 3, 32),
    "cifar100": (50_000, 10_000, 100, 3, 32),
    "tiny-imagenet": (100_000, 10_000, 200, 3, 64),
}


@dataclass(frozen=True)
class Outline:
    """A data set without its images.

    Attributes:
        train, test: how many images. channels, size: of each; they are square.
        augment: of the training images, as in a `CellSpec`.
        train_sha256: of the training images; "" where nobody has read them.
        test_sha256: asked for that of the test images, where a recipe selects on them.
        sample: (2, C, H, W) on which networks are tried; None: they are not.
        basis: where the hash comes from, if not from the images.
    """

    name: str
    train: int
    test: int
    classes: int
    channels: int
    size: int
    augment: str = ""
    train_sha256: str = ""
    test_sha256: Callable[[], str] = field(default=lambda: "", repr=False)
    sample: Tensor | None = field(default=None, repr=False, compare=False)
    basis: str = ""

    @classmethod
    def of(cls, dataset: Dataset) -> Outline:
        return cls(
            name=dataset.name, train=len(dataset.train), test=len(dataset.test),
            classes=len(dataset.classes), channels=dataset.channels, size=dataset.size,
            augment=str(dataset.augment), train_sha256=dataset.train.sha256(),
            test_sha256=dataset.test.sha256, sample=dataset.test.x[:2],
        )


def outline(spec: RunSpec) -> Outline:
    """The data set of a request, without reading it where its shape is known.

    Its hash is then that of the last training on it in `spec.out`. Raises UsageError for an
    unknown name, and for data that must be read and cannot.
    """
    _ = DATASETS[Request.parse(spec.dataset).entry]
    if spec.dataset not in SHAPES:
        return Outline.of(load_dataset(spec.dataset, spec.data_root))
    train, test, classes, channels, size = SHAPES[spec.dataset]
    known = Outline(spec.dataset, train, test, classes, channels, size)
    cells = [cell for cell in map(_read, spec.out.glob("cells/*/spec.json"))
             if cell and cell[1].dataset == spec.dataset]
    if not cells:
        return known
    last = max(cells, key=lambda cell: cell[0])[1]
    chosen = {cell.selection_sha256 for _, cell in cells if cell.data_sha256 == last.data_sha256}
    return replace(known, augment=last.augment, train_sha256=last.data_sha256,
                   test_sha256=lambda: max(chosen), basis="an earlier training")


def _read(path: Path) -> tuple[int, CellSpec] | None:
    """When a cell was begun, and what it is; None for a damaged file."""
    try:
        return path.stat().st_mtime_ns, CellSpec.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None
