"""Ascent: the one projected-ascent loop, for every defense's inner maximization and for PGD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robench.attacks.threat import ThreatModel
from robench.errors import UsageError

Start = Literal["uniform", "normal", "none"]


@dataclass(frozen=True, slots=True)
class Ascent:
    """Projected steepest ascent (Madry et al. 2018, section 2).

    Frozen: a schedule that changes eps or the step per epoch passes `dataclasses.replace(...)`.

    Attributes:
        threat: the allowed images.
        steps: number of gradient steps, >= 0.
        step_size: length of a step in the norm of the threat model, same unit as eps.
        start: "uniform" in the ball, "normal" = x + 0.001 N(0, I) as in TRADES, or "none" = x.
        clamp_start: move the start into the allowed set before the first gradient. TRADES,
            RSLAD and PeerAiD do not: their first point may leave [0, 1] by about 0.001.
    """

    threat: ThreatModel
    steps: int = 10
    step_size: float = 2 / 255
    start: Start = "uniform"
    clamp_start: bool = True

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UsageError(f"steps must be >= 0, not {self.steps}")
        if self.start not in ("uniform", "normal", "none"):
            raise UsageError(f"unknown start {self.start!r}: write uniform, normal or none")
        if not self.step_size >= 0:
            raise UsageError(f"step_size must be >= 0, not {self.step_size}")

    def begin(self, x: Tensor) -> Tensor:
        """The starting point for images x (N, C, H, W), from torch's global generator."""
        if self.start == "none":
            return x.detach().clone()
        if self.start == "normal":
            x_adv = x + 0.001 * torch.randn_like(x)
        elif self.clamp_start or self.threat.norm != "Linf":
            return self.threat.sample(x)
        else:
            x_adv = x + self.threat.eps * (torch.rand_like(x) * 2 - 1)
        return self.threat.project(x_adv, x) if self.clamp_start else x_adv

    def maximize(
        self, objective: Callable[[Tensor], Tensor], x: Tensor, start: Tensor | None = None
    ) -> Tensor:
        """Climb `objective`, which maps images (N, C, H, W) to one number per image (N,), from
        `start` (N, C, H, W), an allowed image, or else from `begin(x)`.

        Returns the last iterate, detached; with at least one step it lies inside the threat
        model. The objective sees every iterate but the last, in order. Gradients are taken
        with respect to the images alone: no parameter's .grad is touched. Modes are the
        caller's business (`frozen`).
        """
        x = x.detach()
        x_adv = self.begin(x) if start is None else start.detach().clone()
        for _ in range(self.steps):
            x_adv.requires_grad_(True)
            with torch.enable_grad():
                value = objective(x_adv).sum()
            (grad,) = torch.autograd.grad(value, x_adv)
            with torch.no_grad():
                # A NaN gradient would poison the image for good; without a direction it waits.
                direction = self.threat.ascent(grad.nan_to_num(nan=0.0))
                x_adv = self.threat.project(x_adv + self.step_size * direction, x)
        return x_adv.detach()
