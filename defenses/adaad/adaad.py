"""AdaAD: adaptive adversarial distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from robench.attacks.objectives import kl
from robench.defenses.base import (
    DEFENSES,
    Adversarial,
    Losses,
    Nets,
    clean_logits,
    mean_over_classes,
)


@DEFENSES.register(
    "adaad",
    description="the attack maximizes the gap between teacher and student at the attacked point",
    paper="Huang et al. 2023, CVPR, 'Boosting Accuracy and Robustness of Student Models via "
    "Adaptive Adversarial Distillation'",
)
@dataclass(frozen=True, kw_only=True)
class AdaAD(Adversarial):
    """min alpha KL(T(x_adv) || s(x_adv)) + (1 - alpha) KL(T(x) || s(x)).

    x_adv maximizes KL(T(x') || s(x')): the gradient flows through the teacher too. Reduction:
    mean over batch and classes for CIFAR-10 (the default), batchmean for CIFAR-100. The clean
    forward runs even at alpha = 1. Batch-norm updates: clean, adv.
    """

    given = {"teacher": "trades"}

    alpha: float = 1.0
    reduction: Literal["mean", "batchmean"] = "mean"

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        student, teacher = nets["student"], nets["teacher"]
        return self.attack(student, x, lambda z: kl(teacher(z), student(z)), teacher)

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        student, teacher = nets["student"], nets["teacher"]
        clean = self._reduce(clean_logits(teacher, x), student(x))
        adv = self._reduce(clean_logits(teacher, x_adv), student(x_adv))
        return Losses({"kl_adv": self.alpha * adv, "kl_clean": (1 - self.alpha) * clean})

    def _reduce(self, target: Tensor, logits: Tensor) -> Tensor:
        divergence = kl(target, logits)
        if self.reduction == "mean":
            return mean_over_classes(divergence, logits)
        return divergence.mean()
