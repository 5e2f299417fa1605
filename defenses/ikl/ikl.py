"""IKL: adversarial training with the improved Kullback-Leibler loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.attacks.ascent import Ascent
from robench.defenses.base import (
    DEFENSES,
    Adversarial,
    Losses,
    Moment,
    Nets,
    Remembered,
    clean_logits,
)


@DEFENSES.register(
    "ikl",
    description="soft cross-entropy and class-weighted differences of logits in place of the KL",
    paper="Cui et al. 2024, NeurIPS, arXiv 2305.13948",
)
@dataclass(frozen=True, kw_only=True)
class IKL(Adversarial):
    """min CE(s(x), y) + alpha CE(s(x_adv), p(x)) + beta D(s(x), s(x_adv)).

    p(x) = softmax(s(x)), detached in this term alone. D is `weighted_mse`, with the mean
    prediction for the class of the image in the epoch before as weights. x_adv maximizes
    CE(s(x'), p(x)), p(x) fixed. Batch-norm updates: adv, clean. Published inside AWP: `ikl+awp`.

    Attributes:
        step_size: in the unit of eps; None means eps / 2, of the eps of the moment.
        alpha, beta: weights of soft cross-entropy and D.
        temperature: of the predictions that are averaged per class.
        ramp: eps grows linearly over the epochs and is reached in the last one.
    """

    steps: int = 5
    alpha: float = 4.0
    beta: float = 20.0
    temperature: float = 4.0
    ramp: bool = True

    @property
    def ascent(self) -> Ascent:
        step_size = self.threat.eps / 2 if self.step_size is None else self.step_size
        return replace(super().ascent, step_size=step_size)

    def memory(self, nets: Nets, classes: int) -> Mapping[str, nn.Module]:
        """`classes`: the (K, K) `means` used now, row y for class y; `sums` for the next ones."""
        weight = next(nets["student"].parameters())
        return {"classes": Remembered(
            means=weight.new_full((classes, classes), 1 / classes),
            sums=weight.new_zeros(classes, classes),
        )}

    def at(self, now: Moment) -> IKL:
        """The same with the eps of this epoch, no longer on the ramp."""
        if not self.ramp:
            return self
        eps_now = self.threat.scaled((now.epoch + 1) / now.epochs)
        return replace(self, threat=eps_now, ramp=False)

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        student = nets["student"]
        target = clean_logits(student, x).softmax(1)
        return self.attack(
            student, x, lambda z: F.cross_entropy(student(z), target, reduction="none")
        )

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        student, weights = nets["student"], nets["classes"].get_buffer("means")[y]
        adv, clean = student(x_adv), student(x)
        return Losses(
            {
                "ce": self.label_loss(clean, y),
                "soft_ce": self.alpha * F.cross_entropy(adv, clean.detach().softmax(1)),
                "wmse": self.beta * weighted_mse(clean, adv, weights).mean(),
            },
            seen={"clean": clean.detach()},
        )

    def after_step(self, nets: Nets, x: Tensor, y: Tensor, losses: Losses) -> None:
        sums = nets["classes"].get_buffer("sums")
        soft = (losses.seen["clean"] / self.temperature).softmax(1).to(sums.dtype)
        sums += F.one_hot(y, len(sums)).to(soft.dtype).T @ soft

    def after_epoch(self, nets: Nets) -> None:
        means, sums = (nets["classes"].get_buffer(name) for name in ("means", "sums"))
        count = sums.sum(1, keepdim=True)  # every prediction sums to 1
        means.copy_(torch.where(count > 0, sums / count, means))  # as before for a missing class
        sums.zero_()


def weighted_mse(clean: Tensor, adv: Tensor, weights: Tensor) -> Tensor:
    """1/4 sum_jk w_j w_k ((n_j - n_k) - (a_j - a_k))^2, for each image: (N,).

    n and a are logits (N, K), the weights (N, K) sum to 1 in each row. The double sum is half
    the variance of n - a under these weights, which takes K terms instead of K^2.
    """
    gap = clean - adv
    mean = (weights * gap).sum(1, keepdim=True)
    return (weights * (gap - mean) ** 2).sum(1) / 2
