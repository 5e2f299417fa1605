"""Data sets: labelled images in [0, 1], their split and augmentation."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robench.benchmark.data.streams import Streamed
from robench.errors import UsageError

CHUNK = 2**24  # bytes of pixels that are hashed at a time


@dataclass(frozen=True, eq=False)  # eq: comparing tensors does not give one truth value
class Images:
    """A labelled set of images, in memory or read when they are needed.

    Either way `x[start:stop]` and `x[index]` are tensors. `take`, `select` and `to` read nothing.
    """

    x: Tensor | Streamed  # (N, C, H, W) float32 in [0, 1]
    y: Tensor  # (N,) int64 in [0, K)

    def __len__(self) -> int:
        return len(self.y)

    def take(self, n: int | None) -> Images:
        """The first n images, or all for None. Raises UsageError if there are fewer."""
        if n is None:
            return self
        if not 1 <= n <= len(self):
            raise UsageError(f"cannot take {n} of {len(self)} images: ask for 1 to {len(self)}")
        return self._at(slice(n))

    def select(self, index: Tensor) -> Images:
        """The images at `index`: (M,) int64 positions, in this order, or an (N,) bool mask."""
        return self._at(index)

    def _at(self, index: slice | Tensor) -> Images:
        x = self.x.at(index) if isinstance(self.x, Streamed) else self.x[index]
        return Images(x, self.y[index])

    def to(self, device: torch.device | str) -> Images:
        return Images(self.x.to(device), self.y.to(device))

    def held(self) -> Held:
        """All in memory, whatever that takes."""
        return Held(self.x[:] if isinstance(self.x, Streamed) else self.x, self.y)

    def fitted(self) -> Images:
        """In memory, if a share of a large data set is small enough; else as they are."""
        small = isinstance(self.x, Streamed) and len(self.x.pieces()) == 1
        return self.held() if small else self

    def checked(self, classes: int) -> Images:
        """The same, or a UsageError that names what is wrong with them: see `check_images`.

        Pixels that are read later come from bytes, and are in [0, 1] by construction.
        """
        if isinstance(self.x, Streamed):
            return Images(self.x, check_labels(self.y, classes))
        return Images(*check_images(self.x, self.y, classes))

    def sha256(self) -> str:
        """Of exactly these images and labels: the shape, the pixels and the labels."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256(repr(tuple(self.x.shape)).encode())
        # As bytes in NCHW order, whatever the memory format.
        for part in chain(self._chunks(), [self.y]):
            digest.update(part.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def _chunks(self) -> Iterator[Tensor]:
        if isinstance(self.x, Tensor):
            yield self.x
        else:
            size = max(1, CHUNK * len(self) // self.x.bytes)
            yield from self.x.to("cpu").ahead(torch.split(torch.arange(len(self)), size))


@dataclass(frozen=True, eq=False)
class Held(Images):
    """Images that are all in memory."""

    x: Tensor


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
    """A training and a test set with the same classes and image shape, or a test set alone."""

    name: str
    training: Images | None
    test: Images
    classes: tuple[str, ...]  # names; label k means classes[k]
    augment: Augment  # what training applies to a batch

    @property
    def train(self) -> Images:
        """Raises UsageError if there are none."""
        if self.training is None:
            raise UsageError(f"{self.name} has test images only: networks can be evaluated on it, "
                             "but not trained, nor looked at on training images")
        return self.training

    @property
    def channels(self) -> int:
        return self.test.x.shape[1]

    @property
    def size(self) -> int:
        """Height and width in pixels: images are square."""
        return self.test.x.shape[2]


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
    return x.float(), check_labels(y, classes)


def check_labels(y: Tensor, classes: int) -> Tensor:
    """The same, or a UsageError."""
    if y.dtype != torch.int64:
        raise UsageError(f"labels must be int64, not {y.dtype}")
    first, last = (int(label) for label in y.aminmax())
    if first < 0 or last >= classes:
        raise UsageError(f"labels must be in 0..{classes - 1}, not {first}..{last}")
    return y


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
