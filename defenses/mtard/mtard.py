"""MTARD: multi-teacher adversarial robustness distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robench.attacks.objectives import kl
from robench.defenses.base import (
    DEFENSES,
    Adversarial,
    Defense,
    Losses,
    Moment,
    Nets,
    Remembered,
    clean_logits,
)


@DEFENSES.register(
    "mtard",
    description="a robust teacher on attacked images, a natural one on clean ones, balanced",
    paper="Zhao et al. 2022, ECCV, 'Enhanced Accuracy and Robustness via Multi-Teacher "
    "Adversarial Distillation'",
)
@dataclass(frozen=True, kw_only=True)
class MTARD(Adversarial):
    """min w ((1 - b) KL(T(x_adv) || s(x_adv)) + b KL(N(x) || s(x))), x_adv maximizing CE.

    b begins at 1/2. After each step b moves by `rate` of the way to r_N / (r_T + r_N), where r is
    a KL divided by the same one in the very first step: the term that lags gets more weight.
    Reduction: batchmean times w, see RSLAD. Batch-norm updates: adv, clean.

    Attributes:
        rate: at the highest learning rate; it falls with that.
        weight: w.
    """

    given = {"teacher": "trades", "natural": "standard"}

    rate: float = 0.025
    weight: float = 0.1

    def memory(self, nets: Nets, classes: int) -> Mapping[str, nn.Module]:
        like = next(nets["student"].parameters())
        # first: the KL of the first step, natural and robust; 0 until then.
        return {"balance": Remembered(natural=like.new_full((), 0.5), first=like.new_zeros(2))}

    def at(self, now: Moment) -> Defense:
        return replace(self, rate=self.rate * now.lr_share)

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        return self.attack_labels(nets["student"], x, y)

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        student, balance = nets["student"], nets["balance"].get_buffer("natural")
        robust = kl(clean_logits(nets["teacher"], x_adv), student(x_adv)).mean()
        natural = kl(clean_logits(nets["natural"], x), student(x)).mean()
        return Losses(
            {
                "kl_adv": self.weight * (1 - balance) * robust,
                "kl_clean": self.weight * balance * natural,
            },
            seen={"kl": torch.stack([natural, robust]).detach()},
        )

    def after_step(self, nets: Nets, x: Tensor, y: Tensor, losses: Losses) -> None:
        balance = nets["balance"].get_buffer("natural")
        first = nets["balance"].get_buffer("first")
        first.copy_(torch.where(first > 0, first, losses.seen["kl"]))
        relative = losses.seen["kl"] / first
        balance.lerp_(relative[0] / relative.sum(), self.rate)
