"""Spans: where a change of a few pixels reaches, from layer to layer of a network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Span:
    """An interval of rows (or columns) for every place 0, 1, ... of the square in the image.

    Attributes:
        start: its first row at each place. size: its length, the same everywhere.
    """

    start: tuple[int, ...]
    size: int

    @staticmethod
    def cover(low: Iterable[int], high: Iterable[int], length: int) -> Span:
        """Intervals of one size inside [0, length) that cover what of [low, high) is in there."""
        parts = [(max(a, 0), min(b, length)) for a, b in zip(low, high, strict=True)]
        size = max(1, max(b - a for a, b in parts))
        return Span(tuple(min(a, length - size) for a, _ in parts), size)

    @staticmethod
    def hull(spans: Sequence[Span], length: int) -> Span:
        low = [min(starts) for starts in zip(*(span.start for span in spans), strict=True)]
        stops = zip(*(span.stop for span in spans), strict=True)
        return Span.cover(low, [max(stop) for stop in stops], length)

    @property
    def stop(self) -> tuple[int, ...]:
        return tuple(start + self.size for start in self.start)

    def reached(self, conv: nn.Conv2d, axis: int, length: int) -> Span:
        """The outputs of a convolution, `length` in all, that read any of these inputs."""
        reach, stride, padding = _geometry(conv, axis)
        # The second number: what the first of these outputs read begins no later than these.
        low = (min(-((reach - a - padding) // stride), (a + padding) // stride)
               for a in self.start)
        high = ((b - 1 + padding) // stride + 1 for b in self.stop)
        return Span.cover(low, high, length)

    def read(self, conv: nn.Conv2d, axis: int) -> Span:
        """The inputs that these outputs of a convolution read, padding among them.

        And the stride - 1 behind them, which no output may read: all that changed is among them.
        """
        reach, stride, padding = _geometry(conv, axis)
        return Span(tuple(a * stride - padding for a in self.start), self.size * stride + reach)


Window = tuple[Span, Span]  # rows, columns


def _geometry(conv: nn.Conv2d, axis: int) -> tuple[int, int, int]:
    """(reach of the kernel, stride, padding)."""
    reach = (conv.kernel_size[axis] - 1) * conv.dilation[axis]
    return reach, conv.stride[axis], int(conv.padding[axis])
