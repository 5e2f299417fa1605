"""What an attack maximizes. Each function maps logits (N, K) to one number per image (N,).

Labels y are int64 (N,). Each grows as the prediction moves away from y. Losses and softmax run
in float32 or better, whatever the precision of the logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from robench.errors import UsageError


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, -log softmax(logits)_y."""
    return F.cross_entropy(_wide(logits), y, reduction="none")


def cw_margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{k != y} z_k - z_y: positive exactly where the image is misclassified.

    Carlini and Wagner 2017, f6, without the confidence cut.
    """
    logits = _wide(logits)
    true = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - true


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, Croce and Hein 2020, eq. 6; invariant to shift and scale.

    Needs at least 3 classes (raises UsageError below).
    """
    if logits.shape[1] < 3:
        raise UsageError(f"DLR needs at least 3 classes, not {logits.shape[1]}: use loss cw or ce")
    top = _wide(logits).sort(dim=1, descending=True).values
    return cw_margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted DLR, Croce and Hein 2020, eq. 7: pulls towards class target (N,).

    Needs at least 4 classes (raises UsageError below).
    """
    if logits.shape[1] < 4:
        raise UsageError(f"targeted DLR needs at least 4 classes, not {logits.shape[1]}")
    top = _wide(logits).sort(dim=1, descending=True).values
    return targeted_cw(logits, y, target) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def targeted_ce(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """log softmax(logits)_target."""
    return -ce(logits, target)


def targeted_cw(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """z_target - z_y: positive where class target has overtaken the label."""
    logits = _wide(logits)
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def kl(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(target / t) || softmax(logits / t)), summed over classes: (N,).

    Both arguments are logits (N, K); gradient flows into both unless the caller detaches one.
    Reductions of the literature: `batchmean` is kl(...).mean(); torch's default `mean`, used by
    ARD, RSLAD and PeerAiD, also divides by the number of classes: kl(...).mean() / K.
    """
    log_p = F.log_softmax(_wide(target) / temperature, dim=1)
    log_q = F.log_softmax(_wide(logits) / temperature, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


UNTARGETED = {"ce": ce, "cw": cw_margin, "dlr": dlr}
TARGETED = {"targeted-ce": targeted_ce, "targeted-cw": targeted_cw, "targeted-dlr": targeted_dlr}


def objective(name: str, y: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss called `name` as a function of the logits alone: (N, K) -> (N,)."""
    if name in TARGETED:
        return lambda logits: TARGETED[name](logits, y, target)
    return lambda logits: UNTARGETED[name](logits, y)
