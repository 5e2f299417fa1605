"""Random numbers that belong to an image, not to its place in a batch.

A counter-based generator is a function: the numbers of a unit of work depend on (seed, attack,
restart or target, image, draw) and on nothing that was drawn before. Verdicts then do not change
with the batch size, the order, the shard or a resume.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from robench.randomness import derive

_MASK = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
# The constants of SplitMix64 as signed words, which torch has.
_GAMMA, *_MIX = (word - (1 << 64) for word in (
    0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011, section 3.3): 4 counter words, 2 key words -> 4 words.

    Words are int64 tensors with values in [0, 2^32); all broadcast against each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # An int64 product wraps, but its 64 bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLY[0], c2 * _MULTIPLY[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def image_ids(x: Tensor) -> Tensor:
    """(N,) int64: a hash of each image's float32 pixels, its name in every random stream.

    Equal images share their noise, whatever data set, order or shard they come from.
    """
    rows = x.detach().to("cpu", torch.float32).contiguous().numpy()
    ids = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return torch.tensor([int.from_bytes(i, "little", signed=True) for i in ids],
                        dtype=torch.int64, device=x.device)


def stream_keys(ids: Tensor, seed: int, *names: object) -> Tensor:
    """(N, 4) int64 words: the stream called `names` of each image of a run with this seed."""
    key = derive(seed, *names)
    words = torch.tensor([key & _MASK, key >> 32], device=ids.device).expand(len(ids), 2)
    return torch.cat([words, torch.stack([ids & _MASK, (ids >> 32) & _MASK], 1)], 1)


def words(keys: Tensor, draw: Tensor | int, count: int) -> Tensor:
    """(N, count) int64 in [0, 2^32): draw number `draw` (N,) of the streams `keys` (N, 4)."""
    blocks = torch.arange(-(-count // 4), device=keys.device)
    if isinstance(draw, int):
        draw = torch.full_like(keys[:, 0], draw)
    key0, key1, id0, id1 = (column[:, None] for column in keys.unbind(1))
    four = philox((blocks[None, :], draw[:, None], id0, id1), (key0, key1))
    return torch.stack(four, 2).flatten(1)[:, :count]


class Noise(Protocol):
    """Random tensors for N units."""

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, *shape) in [0, 1)."""

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, *shape) standard normal. Not independent of `uniform` of the same noise."""


class GlobalNoise:
    """From torch's global generator, one row per row of x: what training uses."""

    def __init__(self, x: Tensor) -> None:
        self._n, self._device = len(x), x.device

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(self._n, *shape, dtype=dtype, device=self._device)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self._n, *shape, dtype=dtype, device=self._device)


class StreamNoise:
    """One draw from the stream of each unit.

    Args:
        keys: (N, 4) from `stream_keys`.
        draw: (N,) or one number: which draw of the stream, for example the step.
    """

    def __init__(self, keys: Tensor, draw: Tensor | int = 0) -> None:
        self._keys, self._draw = keys, draw

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        bits = words(self._keys, self._draw, math.prod(shape)) >> 8
        return (bits.to(dtype) * 2.0**-24).view(len(bits), *shape)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        count = math.prod(shape)
        half = -(-count // 2)
        # Box and Muller 1958.
        u = (words(self._keys, self._draw, 2 * half).double() + 0.5) * 2.0**-32
        radius, angle = (-2 * u[:, :half].log()).sqrt(), 2 * math.pi * u[:, half:]
        values = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count]
        return values.to(dtype).view(len(values), *shape)


def quick_uniform(seed: Tensor, step: Tensor, count: int) -> Tensor:
    """(N, count) float64 in [0, 1): draw number `step` (N,) of the streams `seed` (N,) int64.

    SplitMix64 (Steele, Lea and Flood 2014) takes a tenth of the operations of Philox, whose
    words would cost as much as all else that a query does besides its pass.
    """
    number = step[:, None] * count + torch.arange(1, count + 1, device=seed.device)
    z = seed[:, None] + number * _GAMMA
    z = (z ^ _shift(z, 30)) * _MIX[0]
    z = (z ^ _shift(z, 27)) * _MIX[1]
    z = z ^ _shift(z, 31)
    return _shift(z, 11).double() * 2.0**-53


def _shift(z: Tensor, bits: int) -> Tensor:
    """z >> bits of unsigned words."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
