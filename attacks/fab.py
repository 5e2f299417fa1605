"""FAB: looks for the nearest adversarial image, one linearization after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robench.attacks.base import ATTACKS, Attack
from robench.attacks.network import Network, Objective, Precision
from robench.attacks.objectives import cw_margin, objective
from robench.attacks.pool import State, Step, Units, per_image
from robench.attacks.search import OneStage
from robench.attacks.threat import DUAL, ThreatModel, lengths
from robench.errors import UsageError

_TINY, _HUGE = 1e-30, 1e32
_PAPER = "Croce and Hein 2020, arXiv 1907.02044"
_TARGETED_PAPER = _PAPER + "; targeted: Croce and Hein 2020, arXiv 2003.01690"
# More change nothing unless the box ends within 0.1 % of the plane.
_NEWTON_STEPS = 12
# Gradients that differ by less than 2^-24 of the largest one count as equal.
_BISECTIONS = 24


@dataclass(frozen=True, slots=True)
class FAB(OneStage):
    """Fast adaptive boundary attack (Croce and Hein 2020, algorithm 1), as AutoAttack runs it:
    without the final search along a line.

    A step linearizes the decision boundary at the iterate, moves to a mixture of the points of
    that plane nearest to the iterate and to the image, and a little beyond. From an adversarial
    point it goes back towards the image. A point counts where it is inside the ball; images
    without such a point come back as they are. The nearest adversarial point of a unit, whatever
    its distance, is state["best"] (N, C, H, W), at state["best_norm"] (N,), inf if there is none.

    Attributes:
        targeted: one plane per step, towards one wrong class after the other, the likeliest
            first; else the nearest of the planes of all classes, a backward pass for each.
        steps: linearizations per restart.
        restarts: per target; the first starts at the image, the others at random points around
            it, at a distance of at most eps / 2.
        targets: classes that are tried.
        alpha_max: largest weight of the image's nearest point in the mixture.
        eta: how far to go, 1 being the plane.
        beta: share of the perturbation that is left after a step back.
    """

    threat: ThreatModel
    targeted: bool = True
    steps: int = 100
    restarts: int = 1
    targets: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "targets", "eta"):
            if not getattr(self, name) >= 1:
                raise UsageError(f"{name} must be >= 1, not {getattr(self, name)}")
        for name in ("alpha_max", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} must be between 0 and 1, not {getattr(self, name)}")

    @property
    def name(self) -> str:
        return "fab-t" if self.targeted else "fab"

    @property
    def unseen_end(self) -> bool:
        return False

    def units(self, classes: int) -> int:
        return self.restarts * (min(self.targets, classes - 1) if self.targeted else 1)

    def rank(self, number: int) -> int:
        return number // self.restarts

    def notes(self, classes: int) -> tuple[str, ...]:
        if not self.targeted or self.targets < classes:
            return ()
        return (f"{self.name}: {classes} classes leave {classes - 1} of the "
                f"{self.targets} targets.",)

    def begin(self, units: Units) -> State:
        return {
            "x_adv": units.x, "point": self._start(units),
            "best": units.x, "best_norm": torch.full_like(units.bar, torch.inf),
        }

    def _start(self, units: Units) -> Tensor:
        if self.restarts == 1:
            return units.x
        threat, base, noise = self.threat, units.x.flatten(1), units.noise(0)
        pixels, dtype = base.shape[1], base.dtype
        way = (noise.uniform(pixels, dtype=dtype) * 2 - 1 if threat.norm == "Linf"
               else noise.normal(pixels, dtype=dtype))
        radius = (units.number % self.restarts != 0).to(dtype) * (threat.eps / 2)
        length = lengths(threat.norm, way).clamp_min(_TINY)
        start = torch.addcmul(base, (radius / length)[:, None], way)
        return start.clamp_(threat.low, threat.high).view_as(units.x)

    def step(self, net: Network, units: Units) -> Step:
        state, threat = units.state, self.threat
        gap, normal = self._plane(net, units)
        candidate = self._advanced(units, gap, normal.flatten(1))
        margin = cw_margin(net.logits(candidate), units.y)
        norm = lengths(threat.norm, (candidate - units.x).flatten(1))
        wrong = margin > units.bar
        closer = wrong & (norm < state["best_norm"])
        # torch.lerp is exact at 0 and 1, and faster than torch.where.
        state["best"] = torch.lerp(state["best"], candidate, per_image(closer.to(norm)))
        state["best_norm"] = torch.where(closer, norm, state["best_norm"])
        kept = torch.where(wrong, self.beta, 1.0).to(norm)
        state["point"] = torch.lerp(units.x, candidate, per_image(kept))
        return Step(candidate, torch.where(norm <= threat.eps, margin, -torch.inf))

    def _plane(self, net: Network, units: Units) -> tuple[Tensor, Tensor]:
        """The linearized boundary: a wrong logit minus the true one (N,), and its gradient."""
        def planes(classes: int) -> list[Objective]:
            if self.targeted:
                return [objective("targeted-cw", units.y, units.target)]
            others = ((units.y + offset) % classes for offset in range(1, classes))
            return [objective("targeted-cw", units.y, other) for other in others]

        nearest: tuple[Tensor, Tensor, Tensor] | None = None
        for _, gap, normal in net.gradients(units.state["point"], planes):
            # After a claim that full precision did not confirm, aim beyond its margin.
            gap = (gap - units.bar).nan_to_num()
            distance = self._distance(gap, normal)
            if nearest is not None:
                closer = distance < nearest[2]
                gap = torch.where(closer, gap, nearest[0])
                normal = torch.lerp(nearest[1], normal, per_image(closer.to(normal)))
                distance = torch.where(closer, distance, nearest[2])
            nearest = gap, normal, distance
        assert nearest is not None, "a classifier has at least two classes"
        return nearest[:2]

    def _distance(self, gap: Tensor, normal: Tensor) -> Tensor:
        slope = lengths(DUAL[self.threat.norm], normal.flatten(1))
        return gap.abs() / slope.clamp_min(_TINY)

    def _advanced(self, units: Units, gap: Tensor, normal: Tensor) -> Tensor:
        """The next point (N, C, H, W), a little beyond a mixture of projections."""
        threat = self.threat
        point, x = units.state["point"].flatten(1), units.x.flatten(1)
        gap_of_x = gap + (x - point).mul_(normal).sum(1)
        moves = onto_plane(
            threat, torch.stack([point, x], 1), torch.stack([gap, gap_of_x], 1), normal)
        far = lengths(threat.norm, moves).clamp_min(1e-8)
        alpha = (far[:, :1] / far.sum(1, keepdim=True)).clamp_max(self.alpha_max)
        mixture = torch.lerp(point, x, alpha)
        mixture.add_(torch.lerp(moves[:, 0], moves[:, 1], alpha), alpha=self.eta)
        return mixture.clamp_(threat.low, threat.high).view_as(units.x)


def onto_plane(threat: ThreatModel, points: Tensor, gap: Tensor, normal: Tensor) -> Tensor:
    """The shortest moves inside the box from points onto a hyperplane.

    In the norm of `threat` (Croce and Hein 2020, section 2). Where the box does not reach the
    plane, the move goes as near to it as the box allows. Pixels with no share in `normal` stay
    where they are.

    Args:
        points: (N, P, D), inside [low, high].
        gap: (N, P) normal . z - b of each point z, where the plane is normal . z = b.
        normal: (N, D).

    Returns (N, P, D), to be added to the points.
    """
    largest = normal.abs().amax(1, keepdim=True).clamp_min(_TINY)
    normal = (normal / largest)[:, None]
    gap = (gap / largest)[:, :, None]
    slope, need = normal.abs(), gap.abs()
    way = normal.sign() * -gap.sign()
    # How far each pixel can go its way: to high or to low, and nowhere if its way is 0.
    half, middle = (threat.high - threat.low) / 2, (threat.high + threat.low) / 2
    room = (way * half).sub_(points).add_(middle).mul_(way)
    if threat.norm == "Linf":
        size = room.clamp_max_(_level(slope, room, need))
    elif threat.norm == "L2":
        limit = room.div_(slope.clamp_min(_TINY))
        size = limit.clamp_max_(_level(slope * slope, limit, need)).mul_(slope)
    else:
        size = _steepest_first(slope, room, need)
    return size.mul_(way)


def _level(weight: Tensor, limit: Tensor, need: Tensor) -> Tensor:
    """The level t (N, P, 1) at which sum_i weight_i min(limit_i, t) over the last dimension is
    need (N, P, 1), a very large one if it never is. weight (N, 1, D) and limit (N, P, D) >= 0.

    The sum is concave and piecewise linear in t: Newton's method comes from below, never passes
    the solution and ends on it.
    """
    part = weight * limit
    reachable = need < part.sum(-1, keepdim=True)
    level = torch.where(reachable, need / weight.sum(-1, keepdim=True), _HUGE)
    for _ in range(_NEWTON_STEPS):
        reached = torch.minimum(limit, level, out=part).mul_(weight).sum(-1, keepdim=True)
        slope = torch.gt(limit, level, out=part).mul_(weight).sum(-1, keepdim=True)
        ahead = level + (need - reached) / slope.clamp_min(_TINY)
        before, level = level, torch.maximum(level, ahead).clamp_max_(_HUGE)
        if level.device.type == "cpu" and torch.equal(level, before):
            break  # a GPU would have to be waited for
    return level


def _steepest_first(slope: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Moves (N, P, D) with slope . move = need that use up the room of the pixels with the
    largest slopes (N, 1, D) in [0, 1]; those at the threshold share what is left to do.

    The threshold is found by bisection, which costs a fourth of a sort.
    """
    gain = slope * room
    part = torch.empty_like(gain)
    below, above = torch.zeros_like(need), torch.ones_like(need)
    for _ in range(_BISECTIONS):
        middle = (below + above) / 2
        enough = torch.gt(slope, middle, out=part).mul_(gain).sum(-1, keepdim=True) > need
        below, above = torch.where(enough, middle, below), torch.where(enough, above, middle)
    sure = torch.gt(slope, above, out=part).mul_(room)
    possible = torch.gt(slope, below, out=gain).mul_(room)
    done, most = ((slope * moved).sum(-1, keepdim=True) for moved in (sure, possible))
    share = (need - done) / (most - done).clamp_min(_TINY)
    return sure.lerp_(possible, share.clamp_(0, 1))


@ATTACKS.register(
    "fab-t",
    description="FAB towards one wrong class after the other: looks for the nearest example",
    paper=_TARGETED_PAPER,
)
def fab_t(
    threat: ThreatModel, steps: int = 100, restarts: int = 1, targets: int = 9,
    precision: Precision = "exact",
) -> Attack:
    return FAB(threat, True, steps, restarts, targets, precision=precision)


@ATTACKS.register(
    "fab",
    description="FAB towards the nearest class at every step, with the gradients of all classes",
    paper=_PAPER,
)
def fab(
    threat: ThreatModel, steps: int = 100, restarts: int = 1, precision: Precision = "exact",
) -> Attack:
    return FAB(threat, False, steps, restarts, precision=precision)
