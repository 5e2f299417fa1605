"""SAAD: sample-wise adaptive adversarial distillation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.attacks.base import frozen
from robench.attacks.objectives import kl
from robench.defenses.base import DEFENSES, Adversarial, Losses, Moment, Nets, clean_logits
from robench.defenses.igdm.igdm import along


@DEFENSES.register(
    "saad",
    description="IGDM in which an image weighs by the teacher's entropy on its adversarial version",
    paper="Lee and Chung 2026, TMLR, arXiv 2512.10275",
)
@dataclass(frozen=True, kw_only=True)
class SAAD(Adversarial):
    """min mean_i w_i (KL_adv + a IGDM)_i + b (1 - w_i / max w) KL(T(x) || s(x))_i.

    KL_adv and IGDM are the two terms of IGDM, a is igdm_alpha, b clean_weight. The weight is
    w_i = scale (H_i - min H), H_i the entropy of T(x_adv). x_adv maximizes KL(t(x') || s(x')),
    where t(x') is T(x) plus, for the true class, correction <grad T_y(x), x' - x>. Reduction:
    batchmean. Batch-norm updates: adv, x - d, clean; the clean one also at clean_weight 0.

    Attributes:
        correction: of the first-order term in the attack; 0 attacks as RSLAD does.
        igdm_alpha: a at the end; it grows linearly over the epochs. Published: 1 on
            CIFAR-10, 10 on CIFAR-100 and Tiny-ImageNet.
        entropy_order: order of the Renyi entropy H; 1 is Shannon's.
        clean_weight: b.
        scale: of the weights w.
    """

    given = {"teacher": "trades"}

    correction: float = 1.0
    igdm_alpha: float = 1.0
    entropy_order: float = 1.0
    clean_weight: float = 0.0
    scale: float = 5.0

    def at(self, now: Moment) -> SAAD:
        return replace(self, igdm_alpha=self.igdm_alpha * (now.epoch + 1) / now.epochs)

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        student = nets["student"]
        clean, slope = _label_slope(nets["teacher"], x, y)
        label = F.one_hot(y, clean.shape[1])

        def objective(z: Tensor) -> Tensor:
            rise = (slope * (z - x)).flatten(1).sum(1, keepdim=True)
            return kl(clean + self.correction * rise * label, student(z))

        return self.attack(student, x, objective)

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        student, teacher = nets["student"], nets["teacher"]
        target, target_change = along(lambda z: clean_logits(teacher, z), x, x_adv)
        adv, change = along(student, x, x_adv)
        clean = kl(clean_logits(teacher, x), student(x))
        entropy = renyi_entropy(target, self.entropy_order)
        weight = self.scale * (entropy - entropy.min())
        share = weight / weight.max().clamp_min(1e-8)  # a batch of equal entropies weighs nothing
        return Losses({
            "kl_adv": (weight * kl(target, adv)).mean(),
            "igdm": self.igdm_alpha * (weight * kl(target_change, change)).mean(),
            "kl_clean": self.clean_weight * ((1 - share) * clean).mean(),
        })


def renyi_entropy(logits: Tensor, order: float) -> Tensor:
    """(N,) entropies, in nats, of softmax(logits) (N, K); order 1 is Shannon's."""
    log_p = logits.log_softmax(1)
    if order == 1:
        return -(log_p.exp() * log_p).sum(1)
    return (order * log_p).logsumexp(1) / (1 - order)


def _label_slope(net: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, K) in eval mode, and the gradient (N, C, H, W) of that of the label."""
    with frozen(net), torch.enable_grad():
        z = x.detach().clone().requires_grad_()
        logits: Tensor = net(z)
        (slope,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), z)
    return logits.detach(), slope
