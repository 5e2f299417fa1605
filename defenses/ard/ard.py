"""ARD: adversarially robust distillation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robench.attacks.ascent import Start
from robench.attacks.base import Mode
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
    "ard",
    description="the teacher's clean soft labels, distilled on adversarial examples",
    paper="Goldblum et al. 2020, arXiv 1905.09747",
)
@dataclass(frozen=True, kw_only=True)
class ARD(Adversarial):
    """min alpha t^2 KL(T(x)/t || s(x_adv)/t) + (1 - alpha) CE(s(x), y), x_adv maximizing CE.

    Reduction: mean over batch and classes. The student is in train mode while crafting, and the
    clean forward runs even at alpha = 1. Batch-norm updates: one per ascent step, adv, clean.
    """

    given = {"teacher": "trades"}

    start: Start = "uniform"
    craft_mode: Mode = "train"
    temperature: float = 30.0
    alpha: float = 1.0

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        return self.attack_labels(nets["student"], x, y)

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        student, t = nets["student"], self.temperature
        target = clean_logits(nets["teacher"], x)
        distill = t * t * mean_over_classes(kl(target, student(x_adv), t), target)
        natural = self.label_loss(student(x), y)
        return Losses({"kl_teacher": self.alpha * distill, "ce": (1 - self.alpha) * natural})
