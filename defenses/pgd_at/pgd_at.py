"""PGD adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robench.attacks.ascent import Start
from robench.defenses.base import DEFENSES, Adversarial, Losses, Nets


@DEFENSES.register(
    "pgd-at",
    description="cross-entropy on PGD examples",
    paper="Madry et al. 2018, arXiv 1706.06083",
)
@dataclass(frozen=True, kw_only=True)
class PGDAT(Adversarial):
    """min CE(s(x_adv), y) with x_adv maximizing CE(s(x'), y). Batch-norm updates: adv.

    Attributes:
        extra_clean_forward: after each step one clean forward in train mode, as the released
            code of Rice et al. 2020 does for its log; batch-norm then sees clean images too.
    """

    start: Start = "uniform"
    clamp_start: bool = True
    extra_clean_forward: bool = False

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        return self.attack_labels(nets["student"], x, y)

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        return Losses({"ce_adv": self.label_loss(nets["student"](x_adv), y)})

    def after_step(self, nets: Nets, x: Tensor, y: Tensor, losses: Losses) -> None:
        if self.extra_clean_forward:
            nets["student"](x)
