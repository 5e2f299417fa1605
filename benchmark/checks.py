"""Is an evaluation trustworthy? Cheap checks that run in every one; more will follow."""

from __future__ import annotations

import torch
from torch import Tensor

from robench.attacks.base import Classifier, frozen
from robench.attacks.memory import out_of_memory
from robench.errors import UsageError, one_line


@torch.no_grad()
def check_logits(model: Classifier, x: Tensor, y: Tensor) -> tuple[str, ...]:
    """Look at the outputs for a first batch x (N, C, H, W). Returns warnings.

    y (M,) are the labels of all images. Raises UsageError if the output is no (N, K) tensor,
    holds NaN, or has no place for a label.
    """
    with frozen(model):
        try:
            logits, again = model(x), model(x)
        except Exception as error:  # a user's code may raise anything
            if out_of_memory(error) and len(x) > 1:
                return check_logits(model, x[: len(x) // 2], y)
            raise UsageError(f"the model cannot take images of shape {tuple(x.shape)}: "
                             f"{one_line(error)}") from None
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"the model must return logits (N, K) for images (N, C, H, W), "
                         f"not {shape}")
    if logits.shape[1] < 2:
        raise UsageError("the model has one output: it needs a logit for each of two classes or "
                         "more")
    check_finite(logits)
    if int(y.max()) >= logits.shape[1]:
        raise UsageError(f"the model has {logits.shape[1]} outputs, but there are labels up to "
                         f"{int(y.max())}: is it of another data set?")
    warnings = []
    if looks_like_probabilities(logits):
        warnings.append(
            "probabilities: the outputs look like softmax probabilities, not logits; gradients "
            "vanish and the robust accuracy is too high. Return logits."
        )
    if (logits - again).abs().max() > 1e-4:
        warnings.append(
            "random: two passes over the same images differ; a single run of these attacks "
            "overstates the robustness of a randomized model."
        )
    return tuple(warnings)


def check_finite(logits: Tensor) -> Tensor:
    """The same logits, or UsageError."""
    if not torch.isfinite(logits).all():
        raise UsageError("the model returns NaN or infinite logits for clean images")
    return logits


def looks_like_probabilities(logits: Tensor) -> bool:
    """Rows in [0, 1] that sum to 1, as AutoAttack's check does."""
    in_range = bool(logits.min() >= 0) and bool(logits.max() <= 1)
    return in_range and bool((logits.sum(1) - 1).abs().max() < 1e-3)
