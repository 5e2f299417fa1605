"""RSLAD: robust soft label adversarial distillation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robench.attacks.objectives import kl
from robench.defenses.base import DEFENSES, Adversarial, Losses, Nets, clean_logits


@DEFENSES.register(
    "rslad",
    description="the teacher's soft labels replace hard ones in the attack and in the loss",
    paper="Zi et al. 2021, arXiv 2108.07969",
)
@dataclass(frozen=True, kw_only=True)
class RSLAD(Adversarial):
    """min w (5/6 KL(T(x) || s(x_adv)) + 1/6 KL(T(x) || s(x))), x_adv maximizing KL(T(x) || s(x')).

    Reduction: batchmean times w = 0.1. That is the released code at any number of classes: the
    mean over batch and classes for CIFAR-10, ten times that for CIFAR-100. Batch-norm updates:
    adv, clean.

    Attributes:
        weight: w; it scales the loss against weight decay.
        adversarial_share: 5/6.
    """

    given = {"teacher": "trades"}

    weight: float = 0.1
    adversarial_share: float = 5 / 6

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        return self.attack_target(nets["student"], x, clean_logits(nets["teacher"], x))

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        student = nets["student"]
        target = clean_logits(nets["teacher"], x)
        adv = kl(target, student(x_adv)).mean()
        clean = kl(target, student(x)).mean()
        share = self.adversarial_share
        return Losses({
            "kl_adv": self.weight * share * adv,
            "kl_clean": self.weight * (1 - share) * clean,
        })
