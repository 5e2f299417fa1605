"""What training reads: images that are all in memory, or that are read when a batch needs them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor


class Stream(Protocol):
    """N images that are read when they are needed: (N, C, H, W) to those who index it."""

    @property
    def shape(self) -> torch.Size: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice | Tensor) -> Tensor: ...

    def ahead(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """The images at each of `parts`, (M,) int64 positions on the CPU; the next ones are read
        while these are in use."""


Pixels = Tensor | Stream


def shuffled(
    data: tuple[Pixels, Tensor], size: int, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in random order, from number `start` on. A last one of a single image is left out:
    batch-norm cannot use it.

    The order is drawn at once, on the labels' device, wherever the images are read from.
    """
    x, y = data
    order = torch.randperm(len(y), device=y.device)
    parts = [part for part in torch.split(order, size) if len(part) > 1 or len(y) == 1]
    images: Iterator[Tensor]
    if isinstance(x, Tensor):
        images = (x[part] for part in parts[start:])
    else:
        places = torch.split(order.cpu(), size)  # at once: each transfer waits for the device
        images = x.ahead(places[start : len(parts)])
    return ((image, y[part]) for image, part in zip(images, parts[start:], strict=True))


def steps_of(n: int, size: int) -> int:
    """How many batches `shuffled` makes of n images."""
    return max(1, n // size + (n % size > 1))
