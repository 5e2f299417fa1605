"""TRADES: theoretically principled trade-off between robustness and accuracy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robench.attacks.objectives import kl
from robench.defenses.base import DEFENSES, Adversarial, Losses, Nets, clean_logits


@DEFENSES.register(
    "trades",
    description="clean cross-entropy plus beta times KL(clean || adversarial)",
    paper="Zhang et al. 2019, arXiv 1901.08573",
)
@dataclass(frozen=True, kw_only=True)
class TRADES(Adversarial):
    """min CE(s(x), y) + beta KL(s(x) || s(x_adv)), x_adv maximizing KL(s(x) || s(x')).

    The clean side of the KL carries gradient. Reduction: batchmean. Batch-norm updates: clean,
    adv, clean, since the released code forwards the clean batch twice.
    """

    beta: float = 6.0

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        student = nets["student"]
        return self.attack_target(student, x, clean_logits(student, x))

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        student = nets["student"]
        natural = self.label_loss(student(x), y)
        adv = student(x_adv)
        robust = kl(student(x), adv).mean()
        return Losses({"ce": natural, "kl": self.beta * robust})
