"""ADR: annealing self-distillation rectification."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from robench.attacks.ascent import Start
from robench.attacks.base import Mode
from robench.attacks.objectives import kl
from robench.defenses.averaging import ema_update
from robench.defenses.base import DEFENSES, Adversarial, Losses, Moment, Nets, clean_logits


@DEFENSES.register(
    "adr",
    description="PGD-AT or TRADES with labels softened by a running average of the student",
    paper="Wu et al. 2024, ICLR, arXiv 2305.12118",
)
@dataclass(frozen=True, kw_only=True)
class ADR(Adversarial):
    """min CE(s(x_adv), q) with x_adv maximizing CE(s(x'), q), q from an average of s over steps.

    With loss_kind "trades": min CE(s(x), q) + beta KL(s(x) || s(x_adv)), crafted as TRADES does.
    q is `rectified_labels` of the average at x; temperature and trust move along a cosine from
    start to end of the training. Batch-norm updates: one per ascent step, adv; "trades": one per
    ascent step, clean, adv. The average moves after every step, its buffers too.

    Attributes:
        ema_decay: share of the average that a step keeps.
        temperature_start, temperature_end: of the average's predictions.
        trust_start, trust_end: weight of a prediction in q where it agrees with the label.
        beta: weight of the KL, with "trades" alone.
    """

    start: Start = "uniform"
    clamp_start: bool = True
    craft_mode: Mode = "train"
    ema_decay: float = 0.995
    temperature_start: float = 2.5
    temperature_end: float = 2.0
    trust_start: float = 0.7
    trust_end: float = 0.95
    loss_kind: Literal["pgd", "trades"] = "pgd"
    beta: float = 6.0

    def memory(self, nets: Nets, classes: int) -> Mapping[str, nn.Module]:
        return {"ema": copy.deepcopy(nets["student"]).eval().requires_grad_(False)}

    def at(self, now: Moment) -> ADR:
        """The same with both schedules at rest where they are now."""
        temperature = _cosine(self.temperature_start, self.temperature_end, now.share)
        trust = _cosine(self.trust_start, self.trust_end, now.share)
        return replace(self, temperature_start=temperature, temperature_end=temperature,
                       trust_start=trust, trust_end=trust)

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        student = nets["student"]
        if self.loss_kind == "trades":
            return self.attack_target(student, x, clean_logits(student, x))
        labels = self._labels(nets, x, y)
        return self.attack(
            student, x, lambda z: F.cross_entropy(student(z), labels, reduction="none")
        )

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        student, labels = nets["student"], self._labels(nets, x, y)
        if self.loss_kind == "pgd":
            return Losses({"ce_adv": self.label_loss(student(x_adv), labels)})
        clean, adv = student(x), student(x_adv)
        return Losses({
            "ce": self.label_loss(clean, labels),
            "kl": self.beta * kl(clean, adv).mean(),
        })

    def after_step(self, nets: Nets, x: Tensor, y: Tensor, losses: Losses) -> None:
        ema_update(nets["ema"], nets["student"], self.ema_decay)

    def _labels(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        logits = clean_logits(nets["ema"], x)
        return rectified_labels(logits, y, self.temperature_start, self.trust_start)


def rectified_labels(logits: Tensor, y: Tensor, temperature: float, trust: float) -> Tensor:
    """Soft labels (N, K) from logits (N, K) and labels (N,).

    They are w p + (1 - w) onehot(y) for p = softmax(logits / temperature) and, per image,
    w = trust - (max p - p_y), clamped to [0, 1]: a prediction that misses counts for less.
    """
    p = (logits / temperature).softmax(1)
    missed = p.amax(1, keepdim=True) - p.gather(1, y[:, None])
    weight = (trust - missed).clamp(0, 1)
    return weight * p + (1 - weight) * F.one_hot(y, logits.shape[1])


def _cosine(start: float, end: float, share: float) -> float:
    """From start (share 0) to end (share 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
