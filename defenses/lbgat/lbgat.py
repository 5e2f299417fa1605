"""LBGAT: learnable boundary guided adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from robench.attacks.objectives import kl
from robench.defenses.base import DEFENSES, Adversarial, Losses, Nets, clean_logits


@DEFENSES.register(
    "lbgat",
    description="the adversarial logits follow the clean logits of a natural network trained along",
    paper="Cui et al. 2021, ICCV, arXiv 2011.11164",
)
@dataclass(frozen=True, kw_only=True)
class LBGAT(Adversarial):
    """min over s and n   MSE(s(x_adv), n(x)) + CE(n(x), y) + beta KL(s(x) || s(x_adv)).

    x_adv is that of TRADES. The student s and the natural network n train together from
    scratch; the MSE, a mean over batch and classes, moves both, and nothing is detached. KL
    reduction: batchmean. Batch-norm updates: student adv, clean; natural clean.

    Attributes:
        beta: weight of the KL term. Released: 6 and 0.
    """

    trained = ("student", "natural")

    beta: float = 6.0

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        student = nets["student"]
        return self.attack_target(student, x, clean_logits(student, x))

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        student = nets["student"]
        adv, clean = student(x_adv), student(x)
        guide = nets["natural"](x)
        return Losses({
            "mse": F.mse_loss(adv, guide),
            "natural_ce": self.label_loss(guide, y),
            "kl": self.beta * kl(clean, adv).mean(),
        })
