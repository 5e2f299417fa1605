"""verify: no adversarial example counts before it has been checked again, in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robench.attacks.base import Classifier, frozen
from robench.attacks.memory import Batches
from robench.attacks.threat import ThreatModel

# What float32 rounding may add to a distance, as a share of eps (ECOSYSTEM check `in-ball`),
# and to one pixel near 1.
RELATIVE, ABSOLUTE = 1e-5, 1.2e-7
# What has a precision of its own for float32, on GPUs and on the CPU; nothing before torch 2.9.
_KINDS: tuple[Any, ...] = tuple(
    kind for kind in (
        getattr(backend, name, None) for backend, names in (
            (torch.backends.cudnn, ("conv", "rnn")), (torch.backends.cuda, ("matmul",)),
            (torch.backends.mkldnn, ("conv", "rnn", "matmul"))) for name in names)
    if hasattr(kind, "fp32_precision"))


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 means float32: no TF32 or bfloat16 in convolutions and matrix products, no autocast.

    Both of torch's interfaces are set: the older one alone leaves what the newer one says of an
    operation, or refuses to answer where they disagree; set alone, the newer one makes torch
    refuse to those who ask the older one inside, as compiled networks do.
    """
    older, newer = _older_switches(), [kind.fp32_precision for kind in _KINDS]
    if older is not None:
        _set_older_switches(False, "highest")
    for kind in _KINDS:
        kind.fp32_precision = "ieee"
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        if older is not None:
            _set_older_switches(*older)
        for kind, before in zip(_KINDS, newer, strict=True):
            kind.fp32_precision = before


def _older_switches() -> tuple[bool, str] | None:
    """Of convolutions and of matrix products; None where torch does not tell, since somebody has
    set them by the newer interface."""
    try:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _set_older_switches(conv: bool, matmul: str) -> None:
    torch.backends.cudnn.allow_tf32 = conv
    torch.set_float32_matmul_precision(matmul)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of N claimed adversarial examples.

    Attributes:
        fooled: (N,) bool: inside the threat model and misclassified.
        distance: (N,) float64 norm of the perturbation.
        outside: (N,) bool: not finite, or outside the ball or the box; never counted as fooled.
        predicted: (N,) int64 the class with the largest logit; -1 where a logit is not finite.
    """

    fooled: Tensor
    distance: Tensor
    outside: Tensor
    predicted: Tensor


@torch.no_grad()
def verify(model: Classifier, x: Tensor, x_adv: Tensor, y: Tensor, threat: ThreatModel) -> Verdict:
    """Check examples x_adv (N, C, H, W) of images x with labels y (N,) in eval mode and fp32.

    Examples in float64 stay what they are: rounded, they would be other images.
    """
    distance = threat.distance(x_adv, x)
    pixels = x_adv.flatten(1)
    outside = (
        ~torch.isfinite(pixels).all(1)
        | (distance > threat.eps * (1 + RELATIVE) + ABSOLUTE)
        | (pixels < threat.low).any(1)
        | (pixels > threat.high).any(1)
    )
    with frozen(model), full_precision():
        images = x_adv if x_adv.dtype == torch.float64 else x_adv.float()
        logits = Batches(max(1, len(images)))(model, images)
    # A model that answers NaN recognizes nothing: robustness must not come from that.
    predicted = logits.argmax(1).where(torch.isfinite(logits).all(1), -1)
    return Verdict((predicted != y) & ~outside, distance, outside, predicted)
