"""CAT: collaborative adversarial training."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from robench.attacks.objectives import kl
from robench.defenses.base import DEFENSES, Adversarial, Losses, Nets, clean_logits


@DEFENSES.register(
    "cat",
    description="a TRADES student and a cross-entropy peer distill each other's examples",
    paper="Liu et al. 2023, arXiv 2303.14922",
)
@dataclass(frozen=True, kw_only=True)
class CAT(Adversarial):
    """Student s and peer p train together from scratch; one backward, two optimizers.

    Craft: x1 maximizes KL(s(x) || s(x')), x2 maximizes CE(p(x'), y) from a clamped uniform start.
    Own:   CE(s(x), y) + beta KL(s(x) || s(x1))
           + (CE(p(x2), y) + CE(p(x), y)) / 2 + MSE(p(x2), p(x))
    Cross: KL(p(x1) || s(x1)) + KL(s(x2) || p(x2)), targets detached
    Loss:  (1 - w) own + w cross

    Reduction: batchmean; the MSE of the logits is a mean over batch and classes. Clean outputs
    carry gradient. Batch-norm updates: student clean, x1, x2; peer x2, clean, x1.

    Attributes:
        beta: weight of the student's own KL.
        cross_weight: w.
    """

    trained = ("student", "peer")

    beta: float = 6.0
    cross_weight: float = 0.95

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        student, peer = nets["student"], nets["peer"]
        x1 = self.attack_target(student, x, clean_logits(student, x))
        uniform = replace(self, start="uniform", clamp_start=True)
        x2 = uniform.attack_labels(peer, x, y)
        return torch.cat([x1, x2])

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        student, peer = nets["student"], nets["peer"]
        x1, x2 = x_adv.chunk(2)
        clean1, adv1 = student(x), student(x1)
        adv2, clean2 = peer(x2), peer(x)
        with torch.no_grad():
            of_student, of_peer = student(x2), peer(x1)
        own = 1 - self.cross_weight
        peer_ce = (self.label_loss(adv2, y) + self.label_loss(clean2, y)) / 2
        return Losses({
            "student_ce": own * self.label_loss(clean1, y),
            "student_kl": own * self.beta * kl(clean1, adv1).mean(),
            "peer_ce": own * peer_ce,
            "peer_mse": own * F.mse_loss(adv2, clean2),
            "student_cross": self.cross_weight * kl(of_peer, adv1).mean(),
            "peer_cross": self.cross_weight * kl(of_student, adv2).mean(),
        })
