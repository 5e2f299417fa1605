"""AWP: adversarial weight perturbation, around any defense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from robench.defenses.base import WRAPPERS, Defense, Losses, Moment, Nets, Wrapper

_TINY = 1e-20


@WRAPPERS.register(
    "awp",
    description="the loss is taken where the weights are worst within a small distance",
    paper="Wu et al. 2020, NeurIPS, arXiv 2004.05884",
)
@dataclass(frozen=True, kw_only=True)
class AWP(Wrapper):
    """min over w of the defense's loss at w + v, v_l = gamma ||w_l|| g_l / ||g_l||.

    g is the gradient of the same loss on the same batch, l runs over the weights with more than
    one dimension. The gradient is taken and the optimizers step (weight decay and momentum, too)
    at w + v; then v is taken back. The pass for g leaves no trace in batch-norm statistics; the
    one at w + v moves them.

    Attributes:
        gamma: size of v. Released: 0.01 with pgd-at, 0.005 with trades.
        warm_up: from this epoch on (or share of all epochs). Released: 0, and 10 of 200.
    """

    kind = "awp"

    gamma: float = 0.005
    warm_up: float = 0.0

    def begun(self, now: Moment) -> bool:
        return now.reached(self.warm_up) and super().begun(now)

    def at(self, now: Moment) -> Defense:
        return super().at(now) if now.reached(self.warm_up) else self.inner.at(now)

    @contextmanager
    def perturbed(self, nets: Nets, objective: Callable[[Nets], Losses]) -> Iterator[None]:
        with self.inner.perturbed(nets, objective):
            weights = [w for name in self.trained for key, w in nets[name].named_parameters()
                       if w.dim() > 1 and "weight" in key]
            with _buffers_kept(nets):
                shifts = torch.autograd.grad(objective(nets).total, weights, allow_unused=True)
            with torch.no_grad():
                moved = [(w, self.gamma * w.norm() / (g.norm() + _TINY) * g)
                         for w, g in zip(weights, shifts, strict=True) if g is not None]
                for w, v in moved:
                    w.add_(v)
            yield
            with torch.no_grad():
                for w, v in moved:
                    w.sub_(v)


@contextmanager
def _buffers_kept(nets: Nets) -> Iterator[None]:
    buffers: list[Tensor] = [b for net in nets.values() if net.training for b in net.buffers()]
    before = [buffer.clone() for buffer in buffers]
    yield
    for buffer, old in zip(buffers, before, strict=True):
        buffer.copy_(old)
