"""MART: misclassification-aware adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robench.attacks.objectives import ce, kl
from robench.defenses.base import DEFENSES, Adversarial, Losses, Nets


@DEFENSES.register(
    "mart",
    description="boosted cross-entropy, and a KL that weighs misclassified images more",
    paper="Wang et al. 2020, ICLR, 'Improving Adversarial Robustness Requires Revisiting "
    "Misclassified Examples'",
)
@dataclass(frozen=True, kw_only=True)
class MART(Adversarial):
    """min CE(s(x_adv), y) - log(1.0001 - p_adv(y')) + beta (1.0000001 - p(y)) KL(s(x) || s(x_adv)).

    x_adv maximizes CE; p and p_adv are the softmax of s(x) and s(x_adv), y' is the most likely
    wrong class of s(x_adv). Reduction: mean of the images' sums over classes. Nothing but x_adv
    is detached: the weight carries gradient. Batch-norm updates: clean, adv.

    Attributes:
        beta: released: 5 for ResNet-18, 6 for WRN-34-10.
    """

    beta: float = 5.0

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        return self.attack_labels(nets["student"], x, y)

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        student = nets["student"]
        clean, adv = student(x), student(x_adv)
        wrong = adv.detach().scatter(1, y[:, None], -torch.inf).argmax(1)
        # Just above 1, as released: the logarithm stays finite.
        margin = -(1.0001 - _probability(adv, wrong)).log().mean()
        weight = 1.0000001 - _probability(clean, y)
        return Losses({
            "ce_adv": self.label_loss(adv, y),
            "margin": margin,
            "kl": self.beta * (weight * kl(clean, adv)).mean(),
        })


def _probability(logits: Tensor, y: Tensor) -> Tensor:
    """softmax(logits)_y: (N,)."""
    return (-ce(logits, y)).exp()
