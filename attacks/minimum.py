"""DDN and FMN, and the smallest perturbation that a minimum-norm attack finds.

A minimum-norm attack looks for the nearest adversarial example and needs no eps: one run gives
robust accuracy at every eps. Its state holds "best" (N, C, H, W), the nearest adversarial image
so far, and "best_norm" (N,), its distance, inf where there is none yet.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robench.attacks.base import ATTACKS, Classifier
from robench.attacks.network import Network
from robench.attacks.objectives import cw_margin
from robench.attacks.pool import State, Step, Units, new_units, per_image
from robench.attacks.prepare import Prepared, prepared
from robench.attacks.search import OneStage, Pooled
from robench.attacks.threat import DUAL, ThreatModel, lengths
from robench.attacks.verify import verify
from robench.errors import UsageError

BATCH = 256  # units that `minimum_norm` runs at once
# How far `minimum_norm` lengthens a perturbation until full precision confirms it: the nearest
# points lie so close to the boundary that another rounding may put them on its other side.
LENGTHS = (1.0, 1.001, 1.01, 1.1)
_ORDER = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}
_NEWTON_STEPS = 10


@dataclass(frozen=True, slots=True)
class _Shrinking(OneStage):
    """What DDN and FMN share: a step along the gradient, then back to a radius around the image.

    Each image has its own radius, which shrinks while the iterate is misclassified and grows
    while it is not. One forward and one backward pass per step; the first are of the image.

    Attributes:
        steps: gradient steps.
        alpha_init, alpha_final: L2 length of a step; cosine annealed from the first to the last.
    """

    threat: ThreatModel
    steps: int = 100
    alpha_init: float = 1.0
    alpha_final: float = 0.01

    @property
    def unseen_end(self) -> bool:
        return True

    def units(self, classes: int) -> int:
        return 1

    def begin(self, units: Units) -> State:
        infinite = torch.full_like(units.bar, torch.inf)
        return {"x_adv": units.x, "best": units.x, "best_norm": infinite,
                "radius": self._first_radius(units)}

    def step(self, net: Network, units: Units) -> Step:
        state, x, x_adv = units.state, units.x, units.state["x_adv"]
        logits, _, grad = net.gradient(x_adv, lambda logits: self._loss(logits, units.y))
        margin = cw_margin(logits, units.y)
        delta = x_adv - x
        norm = lengths(self.threat.norm, delta.flatten(1))
        # The clean image itself is no find, even where a low precision takes it for one.
        wrong = (margin > units.bar) & (norm > 0)
        better = wrong & (norm < state["best_norm"])
        state["best"] = torch.lerp(state["best"], x_adv, per_image(better.to(norm)))
        state["best_norm"] = torch.where(better, norm, state["best_norm"])

        radius = self._radius(units, wrong, norm, margin, grad)
        last = units.step + 1 >= self.steps
        state["radius"] = torch.where(last, radius.clamp_max(self._inside(x)), radius)
        size = self._annealed(units, self.alpha_init, self.alpha_final)
        moved = delta.addcmul_(grad, per_image(size / _positive(lengths("L2", grad.flatten(1)))))
        moved = self._onto(moved, state["radius"])
        state["x_adv"] = moved.add_(x).clamp_(self.threat.low, self.threat.high)
        return Step(x_adv, torch.where(norm <= self.threat.eps, margin, -torch.inf))

    def _annealed(self, units: Units, first: float, final: float) -> Tensor:
        """(N,) from `first` at step 0 along half a cosine to `final` after the last."""
        turn = units.step.to(units.x.dtype) * (math.pi / self.steps)
        return final + (first - final) / 2 * (1 + turn.cos())

    def _inside(self, x: Tensor) -> float:
        """The radius after the last step, so that the pool may look there: at most eps.

        Every pixel of x + delta is rounded, which could leave the ball again.
        """
        rounding = torch.finfo(x.dtype).eps / 2 * _diagonal(self.threat, x)
        return max(0.0, self.threat.eps - rounding)

    @abstractmethod
    def _first_radius(self, units: Units) -> Tensor:
        """(N,)"""

    @abstractmethod
    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """What the steps climb: (N, K), (N,) -> (N,)."""

    @abstractmethod
    def _radius(
        self, units: Units, wrong: Tensor, norm: Tensor, margin: Tensor, grad: Tensor
    ) -> Tensor:
        """(N,) the next radius, after a look at iterates at distance norm (N,)."""

    @abstractmethod
    def _onto(self, delta: Tensor, radius: Tensor) -> Tensor:
        """Perturbations (N, C, H, W) at the radius; may overwrite delta."""


@ATTACKS.register(
    "ddn",
    description="smallest L2 perturbation: a normalized step, then one more or less far away",
    paper="Rony et al. 2019, arXiv 1811.09600",
)
@dataclass(frozen=True, slots=True)
class DDN(_Shrinking):
    """Decoupled direction and norm (algorithm 1), without its rounding to 256 gray levels.

    Attributes:
        init: first radius.
        gamma: the radius is multiplied by 1 - gamma or 1 + gamma. A distance far below `init`
            takes log(init / distance) / gamma steps to reach.
    """

    init: float = 1.0
    gamma: float = 0.05

    def __post_init__(self) -> None:
        if self.threat.norm != "L2":
            raise UsageError(f"ddn attacks in L2 only, not in {self.threat.norm}: write fmn")
        _check(self, "init", "gamma")

    @property
    def name(self) -> str:
        return "ddn"

    def _first_radius(self, units: Units) -> Tensor:
        return torch.full_like(units.bar, self.init)

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """log sum_{k != y} exp z_k - z_y. The cross-entropy is its softplus: the same direction,
        which the cross-entropy itself loses in float32 where the network is sure."""
        true = logits.gather(1, y[:, None]).squeeze(1)
        return logits.scatter(1, y[:, None], -torch.inf).logsumexp(1) - true

    def _radius(
        self, units: Units, wrong: Tensor, norm: Tensor, margin: Tensor, grad: Tensor
    ) -> Tensor:
        radius = units.state["radius"] * torch.where(wrong, 1 - self.gamma, 1 + self.gamma)
        return radius.clamp_max(_diagonal(self.threat, units.x))

    def _onto(self, delta: Tensor, radius: Tensor) -> Tensor:
        return delta.mul_(per_image(radius / _positive(lengths("L2", delta.flatten(1)))))


@ATTACKS.register(
    "fmn",
    description="smallest perturbation: gradient steps into a ball that adapts to the boundary",
    paper="Pintor et al. 2021, arXiv 2102.12827",
)
@dataclass(frozen=True, slots=True)
class FMN(_Shrinking):
    """Fast minimum-norm attack (algorithm 1), untargeted, in any of the three norms.

    One thing differs from the paper: while nothing was found, the radius is the estimated
    distance to the boundary times 1 + gamma. The bare estimate is exact where the network is
    linear; rounding alone then decides whether an iterate ever crosses.

    Attributes:
        gamma_init, gamma_final: the radius is multiplied by 1 - gamma or 1 + gamma; cosine
            annealed from the first to the last.
    """

    gamma_init: float = 0.05
    gamma_final: float = 0.001

    def __post_init__(self) -> None:
        _check(self, "gamma_init", "gamma_final")

    @property
    def name(self) -> str:
        return "fmn"

    def _first_radius(self, units: Units) -> Tensor:
        return torch.full_like(units.bar, torch.inf)

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return cw_margin(logits, y)

    def _radius(
        self, units: Units, wrong: Tensor, norm: Tensor, margin: Tensor, grad: Tensor
    ) -> Tensor:
        radius, nearest = units.state["radius"], units.state["best_norm"]
        gamma = self._annealed(units, self.gamma_init, self.gamma_final)
        slope = _positive(lengths(DUAL[self.threat.norm], grad.flatten(1)))
        estimate = norm + (margin - units.bar).abs() / slope
        grown = torch.where(nearest < torch.inf, radius, estimate) * (1 + gamma)
        return torch.where(wrong, torch.minimum(radius * (1 - gamma), nearest), grown)

    def _onto(self, delta: Tensor, radius: Tensor) -> Tensor:
        if self.threat.norm == "Linf":
            return _clipped(delta, per_image(radius))
        if self.threat.norm == "L1":
            delta = _thresholded(delta, radius)
        norm = _positive(lengths(self.threat.norm, delta.flatten(1)))
        return delta.mul_(per_image((radius / norm).clamp_max(1)))


def minimum_norm(
    attack: Pooled, model: Classifier, x: Tensor, y: Tensor, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The nearest adversarial images that a minimum-norm attack finds, whatever its eps.

    Every unit of every stage runs to its end on every image. A find counts when full precision
    confirms it, lengthened a little (`LENGTHS`) where it does not at once.

    Args:
        attack: one whose state has "best", as FMN, DDN and FAB.
        x, y: images (N, C, H, W) in the box of the attack's threat model, labels (N,).
        seed: of the random streams of its units.

    Returns:
        x_adv (N, C, H, W) and its distance to x (N,) in float64, in the attack's norm. Images
        that are misclassified as they are have distance 0, and where nothing was found it is
        inf; both come back as they are.

    Raises UsageError for other attacks.
    """
    nearest = x.detach().clone()
    if not len(x):
        return nearest, torch.zeros(0, dtype=torch.float64, device=x.device)
    threat = replace(attack.threat, eps=_diagonal(attack.threat, x))
    with prepared(attack.precision, model, x.detach(), y) as ready:
        distance = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        distance[ready.correct] = torch.inf
        for units in _run(attack, ready, seed):
            found, far = _confirmed(ready.judge, units, threat)
            closer = far < distance[units.image]
            rows = units.image[closer]
            nearest[rows], distance[rows] = found[closer], far[closer]
    return nearest, distance


def accuracy_curve(distance: Tensor, eps: Sequence[float]) -> list[float]:
    """Robust accuracy at each eps: the share of distances (N,) of `minimum_norm` beyond it.

    An upper bound at every eps, as every attack gives: a nearer example may exist.
    """
    return [float((distance > radius).double().mean()) for radius in eps]


def _run(attack: Pooled, ready: Prepared, seed: int) -> Iterator[Units]:
    """All units of the attack on the images that are right, after their last step, in batches."""
    rows = ready.correct.nonzero().flatten().tolist()
    classes = ready.images.ranked.shape[1] + 1
    for stepper in (stage.stepper for stage in attack.stages(classes)):
        for number in range(stepper.units(classes)):
            for start in range(0, len(rows), BATCH):
                chosen = [(image, number) for image in rows[start : start + BATCH]]
                units = new_units(stepper, ready.images, chosen, seed)
                if "best" not in units.state:
                    raise UsageError(f"{stepper.name} looks for no smallest perturbation: "
                                     "use fmn, ddn or fab")
                for _ in range(stepper.steps):
                    stepper.step(ready.net, units)
                    units.step += 1
                yield units


def _confirmed(judge: Classifier, units: Units, threat: ThreatModel) -> tuple[Tensor, Tensor]:
    """Examples (N, C, H, W) and distances (N,): the shortest that is confirmed, else inf."""
    found = best = units.state["best"]
    distance = torch.full((len(units),), torch.inf, dtype=torch.float64, device=best.device)
    for length in reversed(LENGTHS):
        candidate = torch.lerp(units.x, best, length).clamp(threat.low, threat.high)
        verdict = verify(judge, units.x, candidate, units.y, threat)
        found = torch.where(verdict.fooled[:, None, None, None], candidate, found)
        distance = torch.where(verdict.fooled, verdict.distance, distance)
    return found, distance


def _check(attack: _Shrinking, *factors: str) -> None:
    if not attack.steps >= 1:
        raise UsageError(f"steps must be >= 1, not {attack.steps}")
    for name in ("alpha_init", "alpha_final", *factors):
        value = getattr(attack, name)
        if not (0 < value < math.inf):
            raise UsageError(f"{name} must be > 0 and finite, not {value}")
    for name in factors:
        if name.startswith("gamma") and not getattr(attack, name) < 1:
            raise UsageError(f"{name} must be < 1, not {getattr(attack, name)}")


def _positive(values: Tensor) -> Tensor:
    """Values >= 0 as divisors."""
    return values.clamp_min(torch.finfo(values.dtype).tiny)


def _diagonal(threat: ThreatModel, x: Tensor) -> float:
    """The norm of the whole box: no perturbation is larger."""
    return float((threat.high - threat.low) * x[0].numel() ** (1 / _ORDER[threat.norm]))


def _thresholded(delta: Tensor, radius: Tensor) -> Tensor:
    """sign(d) max(|d| - t, 0) with the t of each image that makes the L1 norm `radius` (N,).

    That is the projection onto the ball (Duchi et al. 2008). Newton's method finds t from below,
    as the norm is convex in t; sorting the pixels would cost several times as much.
    """
    size, radius = delta.flatten(1).abs(), radius[:, None]
    t = (size.amax(1, keepdim=True) - radius).clamp_min(0)
    for _ in range(_NEWTON_STEPS):
        over = (size - t).clamp_min_(0)
        pixels = over.sign().sum(1, keepdim=True).clamp_min(1)
        t = (t + (over.sum(1, keepdim=True) - radius) / pixels).clamp_min(0)
    return delta - _clipped(delta, per_image(t.squeeze(1)))


def _clipped(delta: Tensor, bound: Tensor) -> Tensor:
    """clamp(delta, -bound, bound), on a CPU several times as fast as clamp with tensors."""
    return torch.minimum(torch.maximum(delta, -bound), bound)
