"""What speed is measured with: turns, passes, the time of one, and memory."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robench.attacks.base import Classifier
from robench.attacks.network import Network

SAMPLE_EVERY = 0.005  # seconds between two looks at the memory
TIMED_PASSES = 3


class Spread(NamedTuple):
    """Of several runs."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))

    def scaled(self, factor: float) -> Spread:
        return Spread(*(factor * value for value in self))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def rotating(contenders: int, repeats: int) -> Iterator[int]:
    """Whose turn it is: every repeat has all contenders, and begins with another one."""
    for repeat in range(repeats):
        yield from ((repeat + k) % contenders for k in range(contenders))


@contextmanager
def using_threads(number: int | None) -> Iterator[None]:
    """So many of torch's threads inside; None: as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Counter(nn.Module):
    """A network that counts the images that pass through it, forwards and backwards."""

    def __init__(self, net: Classifier) -> None:
        super().__init__()
        self.net = net
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        logits: Tensor = self.net(x)
        if logits.requires_grad:
            logits.register_hook(self._count)  # type: ignore[no-untyped-call]
        return logits

    def _count(self, grad: Tensor) -> None:
        self.backwards += len(grad)


@dataclass(frozen=True)
class PassTime:
    """Seconds per image of a forward pass, and of a forward and a backward pass."""

    forward: float
    both: float

    def floor(self, forwards: float, backwards: float) -> float:
        """Seconds of that many passes of images; a backward pass follows a forward pass."""
        return max(forwards - backwards, 0) * self.forward + backwards * self.both


def time_passes(network: Network, x: Tensor, size: int) -> PassTime:
    """The fastest of a few passes of a batch of `size` of the images x."""
    batch = x[torch.arange(size, device=x.device) % len(x)]

    def fastest(run: Callable[[], object]) -> float:
        times = []
        for _ in range(1 + TIMED_PASSES):  # the first warms up
            wait(x.device)
            began = time.perf_counter()
            run()
            wait(x.device)
            times.append(time.perf_counter() - began)
        return min(times[1:]) / size

    return PassTime(
        forward=fastest(lambda: network.logits(batch)),
        both=fastest(lambda: network.gradient(batch, lambda logits: logits.logsumexp(1))),
    )


class PeakMemory:
    """By how many bytes memory grows inside the block at most: what torch has allocated on a
    GPU, else what is resident of the process, sampled; NaN where the system does not say."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.peak = device, math.nan
        self._over = threading.Event()

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before: float = torch.cuda.memory_allocated(self._device)
        else:
            self._before = self._most = _resident()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self._device) - self._before
            return
        self._over.set()
        self._thread.join()
        self.peak = max(self._most, _resident()) - self._before

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_EVERY):
            self._most = max(self._most, _resident())


def _resident() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # no Linux
        return math.nan
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
