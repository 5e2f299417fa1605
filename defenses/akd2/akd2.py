"""KD & SWA, called AKD2 in later papers: two teachers smooth the labels of attacked images."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from robench.attacks.ascent import Start
from robench.attacks.base import Mode
from robench.defenses.base import DEFENSES, Adversarial, Losses, Nets, clean_logits


@DEFENSES.register(
    "akd2",
    description="labels, a robust and a natural teacher, all three on adversarial examples",
    paper="Chen et al. 2021, ICLR, 'Robust Overfitting May Be Mitigated by Properly Learned "
    "Smoothening'",
)
@dataclass(frozen=True, kw_only=True)
class AKD2(Adversarial):
    """min l CE(s(x_adv), y) + n t^2 H(N(x_adv)/t, s(x_adv)/t) + a t^2 H(T(x_adv)/t, s(x_adv)/t).

    H is the cross-entropy with soft labels, mean over the batch; T the robust teacher, N the
    natural one. x_adv maximizes CE with the student in train mode. Batch-norm updates: one per
    ascent step, adv.

    Attributes:
        temperature: t.
        label_weight, natural_weight, teacher_weight: l, n and a.
    """

    given = {"teacher": "pgd-at", "natural": "standard"}

    start: Start = "uniform"
    craft_mode: Mode = "train"
    temperature: float = 2.0
    label_weight: float = 0.3
    natural_weight: float = 0.1
    teacher_weight: float = 0.6

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        return self.attack_labels(nets["student"], x, y)

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        adv = nets["student"](x_adv)
        natural = self._soft(clean_logits(nets["natural"], x_adv), adv)
        teacher = self._soft(clean_logits(nets["teacher"], x_adv), adv)
        return Losses({
            "ce": self.label_weight * self.label_loss(adv, y),
            "natural": self.natural_weight * natural,
            "teacher": self.teacher_weight * teacher,
        })

    def _soft(self, target: Tensor, logits: Tensor) -> Tensor:
        t = self.temperature
        return t * t * F.cross_entropy(logits / t, (target / t).softmax(1))
