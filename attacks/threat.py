"""ThreatModel: the images an adversary may submit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from robench.attacks.noise import GlobalNoise, Noise
from robench.errors import UsageError
from robench.options import parse_number

Norm = Literal["Linf", "L2", "L1"]
NORMS: tuple[Norm, ...] = get_args(Norm)
DUAL: dict[Norm, Norm] = {"Linf": "L1", "L2": "L2", "L1": "Linf"}
_ALIASES = {"linf": "Linf", "l_inf": "Linf", "inf": "Linf", "l2": "L2", "l_2": "L2", "l1": "L1",
            "l_1": "L1"}


def lengths(norm: Norm, vectors: Tensor) -> Tensor:
    """Norms (...) of vectors (..., D), on a CPU many times as fast as vector_norm alone."""
    if norm == "L2":
        length: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
        return length
    sizes = vectors.abs()
    return sizes.amax(-1) if norm == "Linf" else sizes.sum(-1)


def format_eps(eps: float) -> str:
    """The shortest exact text: 0.2, or 8/255 where no short decimal is exact."""
    if float(f"{eps:.3g}") == eps:
        return f"{eps:.3g}"
    for denominator in (255, 510, 1020):
        numerator = round(eps * denominator)
        if numerator / denominator == eps:
            return f"{numerator}/{denominator}"
    return repr(eps)


@dataclass(frozen=True, slots=True)
class ThreatModel:
    """The images an adversary may submit: ||x_adv - x|| <= eps, every pixel in [low, high].

    eps is in units of the [0, 1] pixel range: 8/255, never 8.
    All methods take batches (N, C, H, W) and treat every image on its own.
    """

    norm: Norm
    eps: float
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise UsageError(f"unknown norm {self.norm!r}: write one of {', '.join(NORMS)}")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise UsageError(f"eps must be a finite number >= 0, not {self.eps}")
        if not self.low < self.high:
            raise UsageError(f"the pixel range [{self.low}, {self.high}] is empty")
        if self.norm == "Linf" and self.eps > self.high - self.low:
            raise UsageError(
                f"eps = {self.eps:g} is larger than the whole pixel range; images are in [0, 1], "
                f"so write Linf:{self.eps:g}/255"
            )

    @classmethod
    def parse(cls, text: str) -> ThreatModel:
        """"Linf:8/255" -> ThreatModel("Linf", 8/255); the inverse of str(). Raises UsageError."""
        norm, colon, eps = text.partition(":")
        canonical = _ALIASES.get(norm.strip().lower())
        if not colon or canonical is None:
            raise UsageError(f"threat model {text!r}: write NORM:EPS, for example Linf:8/255 or "
                             f"L2:0.5 (norms: {', '.join(NORMS)})")
        return cls(canonical, parse_number(eps))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.norm}:{format_eps(self.eps)}"

    def scaled(self, factor: float) -> ThreatModel:
        """The same norm with eps times factor, without the noise of the multiplication."""
        eps = self.eps * factor
        short = float(f"{eps:.6g}")
        return replace(self, eps=short if math.isclose(short, eps, rel_tol=1e-12) else eps)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """(N,) norms of x_adv - x, in float64 so that a sum over many pixels is exact enough."""
        return lengths(self.norm, (x_adv.double() - x.double()).flatten(1))

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The allowed image nearest to x_adv (in L2), for x inside [low, high]. Same shape."""
        if self.norm == "Linf":
            x_adv = torch.minimum(torch.maximum(x_adv, x - self.eps), x + self.eps)
            return x_adv.clamp(self.low, self.high)
        delta = (x_adv - x).flatten(1)
        # The room to the side of the box that delta points to, per pixel.
        base = x.flatten(1)
        room = torch.where(delta > 0, self.high - base, base - self.low).clamp_min(0)
        size = _shrink_l2 if self.norm == "L2" else _shrink_l1
        step = size(delta.abs(), room, self.eps) * delta.sign()
        moved = base + step
        # Thousands of pixels that are all rounded away from x would add up: round towards x.
        too_far = (moved - base).abs() > step.abs()
        moved = torch.where(too_far, torch.nextafter(moved, base), moved)
        return moved.clamp(self.low, self.high).view_as(x)

    def ascent(self, grad: Tensor) -> Tensor:
        """A direction of unit norm that raises the loss fast. Zero where grad is zero.

        Linf: the sign. L2: the normalized gradient. L1: the signs of the 1 % largest entries,
        equally weighted (SLIDE: Tramer and Boneh 2019, section 4.1); the steepest L1 direction
        itself is one single pixel, which the box stops at once.
        """
        if self.norm == "Linf":
            return grad.sign()
        flat = grad.flatten(1)
        if self.norm == "L2":
            # Largest entry to 1 first: the squares of a vanishing gradient would underflow.
            tiny = torch.finfo(grad.dtype).tiny
            flat = flat / flat.abs().amax(dim=1, keepdim=True).clamp_min(tiny)
            unit: Tensor = flat / flat.norm(dim=1, keepdim=True).clamp_min(tiny)
            return unit.view_as(grad)
        k = max(1, flat.shape[1] // 100)
        top = flat.abs().topk(k, dim=1).indices
        direction = torch.zeros_like(flat).scatter_(1, top, flat.gather(1, top).sign())
        return (direction / direction.abs().sum(1, keepdim=True).clamp_min(1)).view_as(grad)

    def sample(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """A random allowed image: uniform in the ball, then moved into the box.

        Random numbers come from `noise`, one row per image, or from torch's global generator.
        """
        if noise is None:
            noise = GlobalNoise(x)
        if self.norm == "Linf":
            uniform = noise.uniform(*x.shape[1:], dtype=x.dtype)
            return self.project(x + self.eps * (uniform * 2 - 1), x)
        d = x[0].numel()
        if self.norm == "L2":  # d coordinates of a point on the sphere in d + 2 dimensions
            normal = noise.normal(d + 2, dtype=x.dtype)
            flat = normal[:, :d] / normal.norm(dim=1, keepdim=True).clamp_min(1e-12)
        else:  # d + 1 exponentials, normalized, are uniform on the simplex; drop one, add signs
            uniform = noise.uniform(2 * d + 1, dtype=x.dtype)
            exponential = -uniform[:, d:].clamp_min(1e-12).log()
            flat = exponential[:, 1:] / exponential.sum(1, keepdim=True)
            flat = torch.where(uniform[:, :d] < 0.5, -flat, flat)
        return self.project(x + self.eps * flat.view_as(x), x)


def _shrink_l2(size: Tensor, room: Tensor, eps: float) -> Tensor:
    """The point nearest to `size` (N, D) with 0 <= u <= room and ||u||_2 <= eps.

    It is min(s * size, room) for one s in [0, 1] per row. s^2 solves an equation that is
    linear between the breakpoints room / size, where one pixel after the other hits the box.
    """
    inside = torch.minimum(size, room)
    fits = inside.norm(dim=1, keepdim=True) <= eps
    breaks, order = torch.where(size > 0, room / size.clamp_min(1e-30), torch.inf).sort(dim=1)
    size2 = size.gather(1, order).square()
    room2 = room.gather(1, order).square()
    # Row k: pixels before k rest at the box, the others still grow with s.
    fixed = torch.cumsum(room2, 1) - room2
    free = size2.flip(1).cumsum(1).flip(1)
    norm2_at_break = fixed + free * breaks.clamp_max(1).square()
    k = (norm2_at_break < eps * eps).sum(1, keepdim=True)
    # As s <= 1, a pixel with a break beyond 1 never rests; rounding must not say otherwise.
    k = torch.minimum(k, (breaks < 1).sum(1, keepdim=True)).clamp_max(size.shape[1] - 1)
    left = (eps * eps - fixed.gather(1, k)).clamp_min(0)
    s = (left / free.gather(1, k).clamp_min(1e-30)).sqrt().clamp_max(1)
    outside = torch.minimum(s * size, room)
    # Rounding may leave the norm a little above eps.
    outside = outside * (eps / outside.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
    return torch.where(fits, inside, outside)


def _shrink_l1(size: Tensor, room: Tensor, eps: float) -> Tensor:
    """The point nearest to `size` (N, D) with 0 <= u <= room and ||u||_1 <= eps.

    It is clamp(size - t, 0, room) for one t >= 0 per row, whose sum falls piecewise linearly in
    t. Bisection finds the piece, which then gives t exactly; a sort would cost several times as
    much.
    """
    inside = torch.minimum(size, room)
    fits = inside.sum(1, keepdim=True) <= eps
    low, high = torch.zeros_like(size[:, :1]), size.amax(1, keepdim=True)
    for _ in range(24 if size.dtype == torch.float32 else 53):
        t = (low + high) / 2
        too_long = (size - t).clamp_(min=0).minimum(room).sum(1, keepdim=True) > eps
        low, high = torch.where(too_long, t, low), torch.where(too_long, high, t)
    left = size - low
    moving = ((left > 0) & (left < room)).sum(1, keepdim=True).clamp_min(1)
    t = low + (left.clamp(min=0).minimum(room).sum(1, keepdim=True) - eps) / moving
    outside = (size - t).clamp_(min=0).minimum(room)
    # Pixels at the threshold, of which a sparse step leaves many, are 0 but for rounding.
    outside = outside * (outside > 8 * torch.finfo(size.dtype).eps * size)
    outside = outside * (eps / outside.sum(1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
    return torch.where(fits, inside, outside)
