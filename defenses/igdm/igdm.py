"""IGDM: indirect gradient distillation module, on top of AdaAD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from robench.attacks.objectives import kl
from robench.defenses.base import DEFENSES, Adversarial, Losses, Moment, Nets, clean_logits


@DEFENSES.register(
    "igdm",
    description="AdaAD, and the student's change along the attack matches the teacher's",
    paper="Lee et al. 2025, ICLR, arXiv 2312.03286",
)
@dataclass(frozen=True, kw_only=True)
class IGDM(Adversarial):
    """min KL(T(x + d) || s(x + d)) + alpha KL(T(x + d) - T(x - d) || s(x + d) - s(x - d)).

    d = x_adv - x, and x_adv maximizes KL(T(x') || s(x')) as in AdaAD. x - d is not clamped. The
    differences of logits are taken as logits: they stand for the gradients along d. Reduction:
    batchmean. Batch-norm updates: adv, x - d.

    Attributes:
        alpha: weight of the second term at the end; it grows linearly over the epochs.
            Published: 1 on CIFAR-10, 10 on CIFAR-100 and Tiny-ImageNet.
    """

    given = {"teacher": "trades"}

    alpha: float = 1.0

    def at(self, now: Moment) -> IGDM:
        return replace(self, alpha=self.alpha * (now.epoch + 1) / now.epochs)

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        student, teacher = nets["student"], nets["teacher"]
        return self.attack(student, x, lambda z: kl(teacher(z), student(z)), teacher)

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        student, teacher = nets["student"], nets["teacher"]
        target, target_change = along(lambda z: clean_logits(teacher, z), x, x_adv)
        adv, change = along(student, x, x_adv)
        return Losses({
            "kl_adv": kl(target, adv).mean(),
            "igdm": self.alpha * kl(target_change, change).mean(),
        })


def along(net: Callable[[Tensor], Tensor], x: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor]:
    """net(x + d) and net(x + d) - net(x - d), logits (N, K) each, for d = x_adv - x.

    The second is, to first order, twice the derivative along d. x - d may leave [0, 1].
    """
    plus = net(x_adv)
    return plus, plus - net(x - (x_adv - x))
