"""Images that are larger than memory: read when they are needed, by threads, ahead of their use."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

GROUP, AHEAD = 32, 2  # images a thread reads at a time; batches that are read ahead
COPIES = 4  # that may be in memory of the images that are worked on: they are a quarter of it

Bytes = npt.NDArray[np.uint8]


class Source(Protocol):
    """Where images lie. It travels to other processes, so it holds no open file."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""

    def read(self, rows: Sequence[int]) -> Bytes:
        """(M, C, H, W): the images at these places, from any thread. Raises UsageError."""


@dataclass(frozen=True, eq=False)
class Streamed:
    """Images of a source; who indexes them gets a float32 tensor (N, C, H, W) in [0, 1].

    Attributes:
        rows: (N,) int64, their places in the source.
        room: bytes that may be filled with pixels at a time.
        device: where tensors are delivered.
    """

    source: Source
    rows: Tensor
    room: int
    device: torch.device = torch.device("cpu")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.rows), *self.source.shape))

    @property
    def bytes(self) -> int:
        """What all of them would take in memory."""
        return 4 * self.shape.numel()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        return self._collected(self._begun(self._rows(index)))

    def at(self, index: slice | Tensor) -> Streamed:
        """Those at `index`, not read yet."""
        return replace(self, rows=self._rows(index))

    def to(self, device: torch.device | str) -> Streamed:
        return replace(self, device=torch.device(device))

    def pieces(self) -> list[slice]:
        """One after the other, each small enough to be worked on in memory."""
        size = max(1, self.room * len(self) // max(1, COPIES * self.bytes))
        return [slice(start, start + size) for start in range(0, len(self), size)]

    def ahead(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """The images at each of `parts`; the next ones are read while these are in use."""
        waiting: deque[list[Future[Bytes]]] = deque()
        try:
            for part in parts:
                waiting.append(self._begun(self._rows(part)))
                if len(waiting) > AHEAD:
                    yield self._collected(waiting.popleft())
            while waiting:
                yield self._collected(waiting.popleft())
        finally:
            for future in (future for futures in waiting for future in futures):
                future.cancel()

    def _rows(self, index: slice | Tensor) -> Tensor:
        return self.rows[index.cpu() if isinstance(index, Tensor) else index]

    def _begun(self, rows: Tensor) -> list[Future[Bytes]]:
        return [_readers().submit(self.source.read, group.tolist())
                for group in torch.split(rows, GROUP) if len(group)]

    def _collected(self, futures: list[Future[Bytes]]) -> Tensor:
        n = 0
        x = torch.empty(GROUP * len(futures), *self.source.shape)
        while futures:
            pixels = futures.pop(0).result()
            x[n : n + len(pixels)] = torch.from_numpy(pixels)
            n += len(pixels)
        # Not on a GPU, which would round otherwise: it multiplies by 1 / 255.
        return x[:n].div_(255).to(self.device)


@cache
def _readers() -> ThreadPoolExecutor:
    """Threads: decoders of images, and reading itself, release the interpreter lock."""
    return ThreadPoolExecutor(thread_name_prefix="images")


@dataclass(frozen=True)
class Array:
    """Some rows of a .npy file (N, H, W, 3) of uint8, which is mapped, not read."""

    path: Path
    start: int
    shape: tuple[int, int, int]

    def read(self, rows: Sequence[int]) -> Bytes:
        pixels = np.load(self.path, mmap_mode="r", allow_pickle=False)
        found = pixels[[self.start + row for row in rows]]
        return np.ascontiguousarray(found.transpose(0, 3, 1, 2))


def half_of_memory(device: torch.device) -> int:
    """Half of the bytes that this machine (or container), and a GPU, has."""
    sizes: list[Any] = []
    if hasattr(os, "sysconf"):  # not on Windows
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    group = Path("/sys/fs/cgroup/memory.max")
    if group.is_file():
        text = group.read_text().strip()
        sizes += [int(text)] if text.isdecimal() else []
    if device.type == "cuda":
        sizes.append(torch.cuda.get_device_properties(device).total_memory)
    return min(sizes, default=8 * 2**30) // 2
