"""HAT: helper-based adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robench.attacks.objectives import kl
from robench.defenses.base import DEFENSES, Adversarial, Losses, Nets, clean_logits


@DEFENSES.register(
    "hat",
    description="TRADES, and images beyond the adversarial ones get a standard network's label",
    paper="Rade and Moosavi-Dezfooli 2022, ICLR, 'Reducing Excessive Margin to Achieve a Better "
    "Accuracy vs. Robustness Trade-off'",
)
@dataclass(frozen=True, kw_only=True)
class HAT(Adversarial):
    """min CE(s(x), y) + beta KL(s(x) || s(x_adv)) + gamma CE(s(x_h), argmax h(x_adv)).

    x_adv is that of TRADES, x_h = x + overshoot (x_adv - x), not clamped, h a standard network.
    The clean side of the KL carries gradient. Reduction: batchmean. Batch-norm updates: clean,
    adv, x_h.

    Attributes:
        overshoot: how many times as far as x_adv the helper image lies from x.
        beta, gamma: weights of the KL and of the helper term.
    """

    given = {"helper": "standard"}

    overshoot: float = 2.0
    beta: float = 2.5
    gamma: float = 0.5

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        student = nets["student"]
        return self.attack_target(student, x, clean_logits(student, x))

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        student = nets["student"]
        clean, adv = student(x), student(x_adv)
        beyond = student(x + self.overshoot * (x_adv - x))
        label = clean_logits(nets["helper"], x_adv).argmax(1)
        return Losses({
            "ce": self.label_loss(clean, y),
            "kl": self.beta * kl(clean, adv).mean(),
            "helper": self.gamma * self.label_loss(beyond, label),
        })
