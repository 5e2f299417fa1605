"""PGD, and FGSM, CW and MI-FGSM, which are PGD with other options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from robench.attacks.base import ATTACKS, Attack
from robench.attacks.network import Network, Precision
from robench.attacks.objectives import TARGETED, cw_margin, objective
from robench.attacks.pool import State, Step, Units
from robench.attacks.search import OneStage
from robench.attacks.threat import ThreatModel
from robench.errors import UsageError

Loss = Literal["ce", "cw", "dlr", "targeted-ce", "targeted-cw", "targeted-dlr"]
Start = Literal["uniform", "none"]


class Ascending(OneStage):
    """What PGD and APGD share: units are restarts, of each target in turn where the loss has any,
    and the last iterate of a unit is still to be looked at."""

    __slots__ = ()

    loss: Loss
    restarts: int
    targets: int

    @property
    def unseen_end(self) -> bool:
        return True

    def units(self, classes: int) -> int:
        targets = min(self.targets, classes - 1) if self.loss in TARGETED else 1
        return targets * self.restarts

    def rank(self, number: int) -> int:
        return number // self.restarts


@ATTACKS.register(
    "pgd",
    description="projected gradient ascent with restarts; any adversarial iterate counts",
    paper="Madry et al. 2018, arXiv 1706.06083",
)
@dataclass(frozen=True, slots=True)
class PGD(Ascending):
    """Projected gradient descent on the loss.

    Attributes:
        steps: gradient steps per restart.
        step_size: in the unit of eps; None means eps / 4 (2/255 at 8/255).
        restarts: independent random starts, per target; an image that has fallen is left alone.
        loss: "ce", "cw", "dlr", or "targeted-ce", "targeted-cw", "targeted-dlr", which pull
            towards one wrong class after the other, the likeliest first.
        start: "uniform" in the ball, or "none": the image.
        momentum: decay of the accumulated gradient (Dong et al. 2018); 0 is plain PGD.
        targets: classes that a targeted loss tries.
    """

    threat: ThreatModel
    steps: int = 20
    step_size: float | None = None
    restarts: int = 1
    loss: Loss = "ce"
    start: Start = "uniform"
    momentum: float = 0.0
    targets: int = 9

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("restarts", 1), ("targets", 1), ("momentum", 0),
                            ("step_size", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UsageError(f"{name} must be >= {least}, not {value}")
        for name, allowed in (("loss", get_args(Loss)), ("start", get_args(Start))):
            if getattr(self, name) not in allowed:
                raise UsageError(f"unknown {name} {getattr(self, name)!r}: write one of "
                                 f"{', '.join(allowed)}")

    @property
    def name(self) -> str:
        return "pgd"

    @property
    def size(self) -> float:
        """Of a step, in the unit of eps."""
        return self.threat.eps / 4 if self.step_size is None else self.step_size

    def begin(self, units: Units) -> State:
        x = units.x
        start = self.threat.sample(x, units.noise(0)) if self.start == "uniform" else x.clone()
        return {"x_adv": start, **({"velocity": torch.zeros_like(x)} if self.momentum else {})}

    def step(self, net: Network, units: Units) -> Step:
        state, x_adv = units.state, units.state["x_adv"]
        logits, _, grad = net.gradient(x_adv, objective(self.loss, units.y, units.target))
        if self.momentum:
            mean = grad.abs().mean(dim=(1, 2, 3), keepdim=True)
            grad = self.momentum * state["velocity"] + grad / mean.clamp_min(1e-30)
            state["velocity"] = grad
        moved = x_adv + self.size * self.threat.ascent(grad)
        state["x_adv"] = self.threat.project(moved, units.x)
        return Step(x_adv, cw_margin(logits, units.y))


@ATTACKS.register(
    "fgsm",
    description="one step of length eps along the gradient, no random start",
    paper="Goodfellow et al. 2015, arXiv 1412.6572",
)
def fgsm(threat: ThreatModel, precision: Precision = "exact") -> Attack:
    return PGD(threat, steps=1, step_size=threat.eps, start="none", precision=precision)


@ATTACKS.register(
    "cw",
    description="PGD on the Carlini-Wagner margin loss",
    paper="Carlini and Wagner 2017, arXiv 1608.04644; as an Linf attack: Madry et al. 2018",
)
def cw(
    threat: ThreatModel, steps: int = 20, step_size: float | None = None, restarts: int = 1,
    precision: Precision = "exact",
) -> Attack:
    return PGD(threat, steps, step_size, restarts, loss="cw", precision=precision)


@ATTACKS.register(
    "mifgsm",
    description="iterated gradient steps with momentum, from the image itself",
    paper="Dong et al. 2018, arXiv 1710.06081",
)
def mifgsm(
    threat: ThreatModel, steps: int = 10, momentum: float = 1.0, precision: Precision = "exact"
) -> Attack:
    size = threat.eps / max(steps, 1)
    return PGD(threat, steps, size, start="none", momentum=momentum, precision=precision)
