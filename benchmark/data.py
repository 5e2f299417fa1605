"""Data sets: labelled images in [0, 1], held in memory, with their augmentation."""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robench.errors import UsageError, one_line
from robench.registry import Registry

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
TEN_DIGITS = tuple("0123456789")


@dataclass(frozen=True, eq=False)  # eq: comparing tensors does not give one truth value
class Images:
    """A labelled set of images, resident in memory."""

    x: Tensor  # (N, C, H, W) float32 in [0, 1]
    y: Tensor  # (N,) int64 in [0, K)

    def __len__(self) -> int:
        return len(self.y)

    def take(self, n: int | None) -> Images:
        """The first n images, or all for None. Raises UsageError if there are fewer."""
        if n is None:
            return self
        if not 1 <= n <= len(self):
            raise UsageError(f"cannot take {n} of {len(self)} images: ask for 1 to {len(self)}")
        return Images(self.x[:n], self.y[:n])

    def select(self, index: Tensor) -> Images:
        """The images at `index`: (M,) int64 positions, in this order, or an (N,) bool mask."""
        return Images(self.x[index], self.y[index])

    def to(self, device: torch.device | str) -> Images:
        return Images(self.x.to(device), self.y.to(device))

    def sha256(self) -> str:
        """Of exactly these images and labels: the shape, the pixels and the labels."""
        digest = hashlib.sha256(repr(tuple(self.x.shape)).encode())
        for part in (self.x, self.y):  # as bytes in NCHW order, whatever the memory format
            digest.update(part.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Augment:
    """Random crop after zero padding, then a horizontal flip with probability 1/2.

    Every image gets its own crop and flip. All of it runs on the images' device without
    waiting for it, and draws from torch's global generator of that device.
    """

    pad: int = 0  # pixels on each side; 0: no crop
    flip: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> a new tensor of the same shape; x itself if there is nothing to do."""
        if not self.pad and not self.flip:
            return x
        n, c, h, w = x.shape
        # Which row and column of the padded image each output pixel is read from: (N, H), (N, W).
        top, left = torch.randint(2 * self.pad + 1, (2, n, 1), device=x.device)
        rows = top + torch.arange(h, device=x.device)
        columns = left + torch.arange(w, device=x.device)
        if self.flip:
            mirrored = torch.rand(n, 1, device=x.device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        image = torch.arange(n, device=x.device)[:, None, None, None]
        channel = torch.arange(c, device=x.device)[:, None, None]
        padded = F.pad(x, [self.pad] * 4)
        return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


@dataclass(frozen=True)
class Dataset:
    """A training and a test set with the same classes and image shape."""

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]  # names; label k means classes[k]
    augment: Augment  # what training applies to a batch

    @property
    def channels(self) -> int:
        return self.train.x.shape[1]

    @property
    def size(self) -> int:
        """Height and width in pixels: images are square."""
        return self.train.x.shape[2]


def check_images(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The pair as (x float32 in [0, 1], y int64), or a UsageError that names the first fault.

    Rounding is forgiven: values down to -1e-6 and up to 1 + 1e-6 are clamped.
    """
    if not x.is_floating_point():
        raise UsageError(f"images must be float in [0, 1], not {x.dtype}: divide by 255")
    if x.dim() != 4 or not x.numel():
        raise UsageError(f"images must have the shape (N, C, H, W), not {tuple(x.shape)}")
    if y.shape != x.shape[:1]:
        raise UsageError(f"{len(x)} images need labels of shape ({len(x)},), not {tuple(y.shape)}")
    low, high = (value.item() for value in x.aminmax())
    if math.isnan(low):  # aminmax passes NaN on
        raise UsageError("images contain NaN")
    if low < -1e-6 or high > 1 + 1e-6:
        raise UsageError(
            f"images must be in [0, 1], not [{low:g}, {high:g}]: divide pixels by 255, and move "
            f"a normalization into the model (its first layer)"
        )
    if low < 0 or high > 1:
        x = x.clamp(0, 1)
    if y.dtype != torch.int64:
        raise UsageError(f"labels must be int64, not {y.dtype}")
    first, last = (int(label) for label in y.aminmax())
    if first < 0 or last >= classes:
        raise UsageError(f"labels must be in 0..{classes - 1}, not {first}..{last}")
    return x.float(), y


def hold_out(images: Images, n: int, seed: int = 0) -> tuple[Images, Images]:
    """Split into (the rest for training, n for validation); each part keeps its order.

    Every class gives its share of the n, up to rounding. The draw depends on the seed and the
    labels alone. Raises UsageError unless 1 <= n < len(images).
    """
    if not 1 <= n < len(images):
        raise UsageError(
            f"cannot hold out {n} of {len(images)} images: ask for 1 to {len(images) - 1}"
        )
    labels = images.y.cpu().numpy()
    counts = np.bincount(labels)
    # Shares are rounded down, and what is then missing goes to the largest remainders. In
    # integers: share * len(images) = n * counts.
    shares, remainders = np.divmod(n * counts, len(images))
    shares[np.argsort(-remainders, kind="stable")[: n - shares.sum()]] += 1
    # numpy promises that the stream of RandomState never changes; torch makes no such promise.
    rng = np.random.RandomState(seed)
    held = np.zeros(len(images), dtype=bool)
    for label, share in enumerate(shares):
        held[rng.permutation(np.flatnonzero(labels == label))[:share]] = True
    mask = torch.from_numpy(held).to(images.y.device)
    return images.select(mask.logical_not()), images.select(mask)


# (name, root or None, download) -> the data set
Loader = Callable[[str, Path | None, bool], Dataset]
DATASETS: Registry[Loader] = Registry("dataset")


def load_dataset(name: str, root: Path | None = None, *, download: bool = False) -> Dataset:
    """A data set by name.

    Args:
        name: a name in DATASETS, where PATH in folder:PATH is a folder of yours.
        root: the folder with the data in torchvision's layout; digits and folder:PATH need none.
        download: let torchvision download into root what is not there.

    Raises UsageError for an unknown name and for data that are missing or damaged.
    """
    return DATASETS["folder:PATH" if name.startswith("folder:") else name].value(
        name, root, download
    )


def _images(pixels: np.ndarray[Any, Any], labels: Any, classes: int) -> Images:
    """pixels (N, C, H, W) uint8 in 0..255, and N labels of any integer type."""
    x = torch.from_numpy(np.ascontiguousarray(pixels)).float().div_(255)
    return Images(*check_images(x, torch.as_tensor(labels, dtype=torch.int64), classes))


@DATASETS.register(
    "digits",
    description="1,797 grey 8x8 digits bundled with scikit-learn; 360 of them are the test set",
    paper="Alpaydin and Kaynak 1998, UCI repository",
)
def digits(name: str, root: Path | None, download: bool) -> Dataset:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    bunch = load_digits()
    x = torch.from_numpy(bunch.images).float().div_(16)[:, None]  # pixels are 0..16
    train, test = hold_out(Images(x, torch.from_numpy(bunch.target).long()), 360)
    return Dataset(name, train, test, TEN_DIGITS, Augment())


def _torchvision(
    source: str, augment: Augment, name: str, root: Path | None, download: bool
) -> Dataset:
    """The class `source` of torchvision.datasets, whose pixels and order are kept."""
    import torchvision.datasets  # type: ignore[import-untyped]

    how = "name its folder with --data-root DIR, or add --download to fetch it into DIR"
    if root is None:
        raise UsageError(f"{name} does not come with robench: {how}")
    reader = getattr(torchvision.datasets, source)
    try:
        # Older torchvisions print to stdout, which is for results.
        with contextlib.redirect_stdout(sys.stderr):
            # The second argument is called train in most readers and split in SVHN's.
            splits = ("train", "test") if source == "SVHN" else (True, False)
            parts = [reader(root, split, download=download) for split in splits]
        classes = tuple(getattr(parts[0], "classes", TEN_DIGITS))
        train, test = (_from_torchvision(part, len(classes)) for part in parts)
    except Exception as error:  # damaged bytes may raise anything in a parser
        raise UsageError(f"cannot read {name} in {root} ({one_line(error)}): {how}") from error
    return Dataset(name, train, test, classes, augment)


def _from_torchvision(part: Any, classes: int) -> Images:
    pixels = np.asarray(part.data)
    if pixels.ndim == 3:  # (N, H, W): grey
        pixels = pixels[:, None]
    elif pixels.shape[1] != 3:  # (N, H, W, 3)
        pixels = pixels.transpose(0, 3, 1, 2)
    return _images(pixels, part.labels if hasattr(part, "labels") else part.targets, classes)


for _name, _source, _augment, _description, _paper in (
    ("mnist", "MNIST", Augment(pad=2), "70,000 grey 28x28 digits", "LeCun et al. 1998"),
    ("fashion-mnist", "FashionMNIST", Augment(pad=2, flip=True), "70,000 grey 28x28 clothes",
     "Xiao et al. 2017, arXiv 1708.07747"),
    ("svhn", "SVHN", Augment(pad=4), "99,289 color 32x32 house numbers", "Netzer et al. 2011"),
    ("cifar10", "CIFAR10", Augment(pad=4, flip=True), "60,000 color 32x32 photos, 10 classes",
     "Krizhevsky 2009"),
    ("cifar100", "CIFAR100", Augment(pad=4, flip=True), "60,000 color 32x32 photos, 100 classes",
     "Krizhevsky 2009"),
):
    DATASETS.register(_name, description=_description, paper=_paper)(
        partial(_torchvision, _source, _augment)
    )


@DATASETS.register(
    "folder:PATH",
    description="your images: PATH/train/<class>/*.png and PATH/test/<class>/*.png (or jpg, ...)",
)
def folder(name: str, root: Path | None, download: bool) -> Dataset:
    """Square images of one size. Grey if all are grey, else all are read as RGB."""
    path = Path(name.removeprefix("folder:")).expanduser()
    files = {split: _image_files(path / split) for split in ("train", "test")}
    classes = tuple(files["train"])
    if different := set(classes) ^ set(files["test"]):
        raise UsageError(f"{path}: class {min(different)!r} is not in both train and test")
    every = [file for split in files.values() for group in split.values() for file in group]
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        pixels = list(pool.map(_read_pixels, every))
    height, width = pixels[0].shape[:2]
    if height != width:
        raise UsageError(f"{every[0]} is {width}x{height}: images must be square")
    for file, image in zip(every, pixels, strict=True):
        if image.shape[:2] != (height, width):
            raise UsageError(f"{file} is {image.shape[1]}x{image.shape[0]}, but {every[0]} is "
                             f"{width}x{height}: all images must have one size")
    if any(image.shape[2] == 3 for image in pixels):
        pixels = [np.broadcast_to(image, (height, width, 3)) for image in pixels]
    decoded = iter(pixels)
    parts = []
    for split in files.values():
        labels = np.repeat(np.arange(len(classes)), [len(group) for group in split.values()])
        x = np.stack([next(decoded) for _ in labels]).transpose(0, 3, 1, 2)
        # The files are sorted by class; shuffled, the first n are a fair sample.
        order = np.random.RandomState(0).permutation(len(labels))
        parts.append(_images(x[order], labels[order], len(classes)))
    return Dataset(name, parts[0], parts[1], classes, Augment())


def _image_files(split: Path) -> dict[str, list[Path]]:
    """Class name -> its image files, both sorted by name."""
    if not split.is_dir():
        raise UsageError(f"no folder {split}: images go to PATH/train/<class>/ and "
                         f"PATH/test/<class>/")
    found = {
        group.name: sorted(f for f in group.iterdir()
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


def _read_pixels(file: Path) -> np.ndarray[Any, Any]:
    """(H, W, 1) for a grey image, (H, W, 3) for a color image; uint8."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode not in ("1", "L", "P", "RGB"):
                raise UsageError(f"{file} has the mode {image.mode}: save it as 8-bit grey or RGB, "
                                 f"without transparency")
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except UsageError:
        raise
    except Exception as error:  # damaged bytes may raise anything in a decoder
        raise UsageError(f"cannot read {file} ({one_line(error)})") from error
    return pixels.reshape(*pixels.shape[:2], -1)
