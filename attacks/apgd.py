"""Auto-PGD: projected gradient ascent that sets its own step size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast, get_args

import torch
from torch import Tensor

from robench.attacks.base import ATTACKS, Attack
from robench.attacks.gradient import Ascending, Loss
from robench.attacks.network import Network, Precision
from robench.attacks.objectives import TARGETED, cw_margin, objective
from robench.attacks.pool import State, Step, Stepper, Units, per_image
from robench.attacks.search import Stage
from robench.attacks.threat import ThreatModel, lengths
from robench.errors import UsageError

# loss -> (classes that it needs, what takes its place where there are fewer)
_NEEDS: dict[Loss, tuple[int, Loss]] = {"dlr": (3, "cw"), "targeted-dlr": (4, "targeted-cw")}
_PAPER = "Croce and Hein 2020, arXiv 2003.01690; in L1: Croce and Hein 2021, arXiv 2103.01208"


@dataclass(frozen=True, slots=True)
class APGD(Ascending):
    """Auto-PGD (Croce and Hein 2020, algorithm 1; in L1: Croce and Hein 2021, algorithm 1).

    The schedules are those of AutoAttack's code. A call of `step` looks at an iterate and moves
    to the next one, which leaves the last one to the pool.

    Attributes:
        loss: "ce", "cw", "dlr", or "targeted-ce", "targeted-cw", "targeted-dlr", which pull
            towards one wrong class after the other, the likeliest first.
        steps: gradient steps per restart.
        restarts: independent random starts, per target.
        targets: classes that a targeted loss tries.
        eot: gradients that are averaged in every step, for networks that are random. With more
            than one only the last misclassified iterate of a run is tried again at its end: a
            lucky draw must not have a hundred chances.
        rho: the step size is halved unless the loss rose in more than this share of the steps
            since the last checkpoint; Linf and L2.
        large_eps: L1 only, and there on unless False: the first 60 % of the steps run in balls
            of 3 eps and 2 eps, in halves, each from the best iterate so far.
    """

    threat: ThreatModel
    loss: Loss = "ce"
    steps: int = 100
    restarts: int = 1
    targets: int = 9
    eot: int = 1
    rho: float = 0.75
    large_eps: bool | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "targets", "eot"):
            if not getattr(self, name) >= 1:
                raise UsageError(f"{name} must be >= 1, not {getattr(self, name)}")
        if not 0 <= self.rho <= 1:
            raise UsageError(f"rho must be between 0 and 1, not {self.rho}")
        if self.loss not in get_args(Loss):
            raise UsageError(f"unknown loss {self.loss!r}: write one of "
                             f"{', '.join(get_args(Loss))}")
        if self.large_eps and self.threat.norm != "L1":
            raise UsageError(f"large_eps is for L1, not for {self.threat.norm}")

    @property
    def name(self) -> str:
        short = "t" if self.loss == "targeted-dlr" else self.loss.replace("targeted", "t")
        return f"apgd-{short}"

    def for_classes(self, classes: int) -> APGD:
        """The same with a loss that a network with that many classes has."""
        needed, other = _NEEDS.get(self.loss, (0, self.loss))
        return replace(self, loss=other) if classes < needed else self

    def stages(self, classes: int) -> tuple[Stage, ...]:
        return (Stage(cast(Stepper, self.for_classes(classes))),)

    def notes(self, classes: int) -> tuple[str, ...]:
        loss, notes = self.for_classes(classes).loss, []
        if loss != self.loss:
            notes.append(f"{self.name}: {classes} classes are too few for the loss {self.loss}; "
                         f"{loss} takes its place.")
        if self.loss in TARGETED and classes - 1 < self.targets:
            notes.append(f"{self.name}: {classes} classes leave {classes - 1} of the "
                         f"{self.targets} targets.")
        return tuple(notes)

    def begin(self, units: Units) -> State:
        x, numbers = units.x, units.bar
        start = self._start(units)
        state = {
            "x_adv": start, "x_best": start, "grad_best": torch.zeros_like(x),
            "best": torch.full_like(numbers, -torch.inf),
        }
        if self.eot > 1:
            state |= {"fooled": start, "lucky": torch.zeros_like(units.step, dtype=torch.bool)}
        if self.threat.norm == "L1":
            pixels = x[0].numel()
            return state | {
                "size": torch.full_like(numbers, self.threat.eps),
                "support": torch.full_like(units.step, pixels),
                "kept": torch.full_like(units.step, -(-pixels // 5)),
            }
        period = max(int(0.22 * self.steps), 1)
        return state | {
            "x_old": start,
            "size": torch.full_like(numbers, 2 * self.threat.eps),
            "last": torch.zeros_like(numbers),
            "checked": torch.full_like(numbers, -torch.inf),
            "rises": torch.zeros_like(units.step),
            "period": torch.full_like(units.step, period),
            "due": torch.full_like(units.step, period),
        }

    def _start(self, units: Units) -> Tensor:
        """On the sphere, but for what the box cuts off."""
        x, threat, noise = units.x, self.threat, units.noise(0)
        if threat.norm == "L1":
            ball = threat.scaled(3) if self._warm else threat
            return ball.project(x + noise.normal(*x.shape[1:], dtype=x.dtype), x)
        if threat.norm == "L2":
            way = noise.normal(*x.shape[1:], dtype=x.dtype)
            length = _norm(way)
        else:
            way = noise.uniform(*x.shape[1:], dtype=x.dtype) * 2 - 1
            length = way.abs().amax((1, 2, 3), keepdim=True)
        way = way * (threat.eps / length.clamp_min(1e-12))
        return (x + way).clamp_(threat.low, threat.high)

    def step(self, net: Network, units: Units) -> Step:
        state, x_adv = units.state, units.state["x_adv"]
        logits, loss, grad = self._look(net, units)
        better = loss > state["best"]
        state["best"] = torch.where(better, loss, state["best"])
        state["x_best"] = torch.where(per_image(better), x_adv, state["x_best"])
        state["grad_best"] = torch.where(per_image(better), grad, state["grad_best"])
        sparse = self.threat.norm == "L1"
        back = self._adapt_sparsity(units) if sparse else self._adapt_size(units, loss)
        here = torch.where(per_image(back), state["x_best"], x_adv)
        grad = torch.where(per_image(back), state["grad_best"], grad)
        move = self._move_sparsely if sparse else self._move
        state["x_adv"] = move(units, here, grad)
        return Step(x_adv, self._claim(units, x_adv, cw_margin(logits, units.y)))

    def _look(self, net: Network, units: Units) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and loss of the last pass, and the sum of the gradients: only its direction
        counts."""
        x_adv, loss_of = units.state["x_adv"], objective(self.loss, units.y, units.target)
        logits, loss, grad = net.gradient(x_adv, loss_of)
        for _ in range(self.eot - 1):
            logits, loss, another = net.gradient(x_adv, loss_of)
            grad = grad + another
        return logits, loss, grad

    def _claim(self, units: Units, x_adv: Tensor, margin: Tensor) -> Tensor:
        """The margin (N,) with which x_adv counts at once."""
        state = units.state
        if self._warm:
            margin = torch.where(self._phase(units.step)[1] == 1, margin, -torch.inf)
        if self.eot == 1:
            return margin
        wrong, last = margin > 0, units.step == self.steps - 1
        state["fooled"] = torch.where(per_image(wrong), x_adv, state["fooled"])
        state["lucky"] = state["lucky"] | wrong
        state["x_adv"] = torch.where(
            per_image(last & state["lucky"]), state["fooled"], state["x_adv"])
        return torch.full_like(margin, -torch.inf)

    # Linf and L2: the step size is halved at checkpoints

    def _adapt_size(self, units: Units, loss: Tensor) -> Tensor:
        """At a checkpoint, (N,) bool: halve the step size and go back to the best iterate."""
        state, moved = units.state, units.step > 0
        rises = state["rises"] + (moved & (loss > state["last"]))
        # AutoAttack's code takes the loss before the first step to be 0.
        state["last"] = torch.where(moved, loss, 0)
        period, due = state["period"], state["due"]
        check = units.step == due
        back = check & ((rises <= self.rho * period) | (state["checked"] >= state["best"]))
        # Right after a reduction the lack of progress is no reason for another one.
        checked = torch.where(back, -torch.inf, state["best"])
        state["checked"] = torch.where(check, checked, state["checked"])
        state["size"] = torch.where(back, state["size"] / 2, state["size"])
        shorter = (period - max(int(0.03 * self.steps), 1)).clamp_min(
            max(int(0.06 * self.steps), 1))
        state["period"] = torch.where(check, shorter, period)
        state["due"] = torch.where(check, due + shorter, due)
        state["rises"] = torch.where(check, 0, rises)
        return back

    def _move(self, units: Units, here: Tensor, grad: Tensor) -> Tensor:
        """A step along the gradient, then 3/4 of the way there plus 1/4 of the last move."""
        state, x = units.state, units.x
        inside = self._bounded(x) if self.threat.norm == "Linf" else self._radial(x)
        size = per_image(state["size"])
        if self.threat.norm == "Linf":
            ahead = inside(torch.addcmul(here, size, grad.sign_()))
        else:
            ahead = inside(torch.addcmul(here, size / _norm(grad).clamp_min(1e-30), grad))
        share = torch.where(units.step == 0, 1.0, 0.75).to(x.dtype)
        drift = (here - state["x_old"]).add_(here)
        state["x_old"] = here
        return inside(drift.lerp_(ahead, per_image(share)))

    def _bounded(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """The projection in Linf, in place."""
        threat = self.threat
        lower = (x - threat.eps).clamp_min_(threat.low)
        upper = (x + threat.eps).clamp_max_(threat.high)
        return lambda z: z.clamp_(lower, upper)

    def _radial(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Into the L2 ball and then into the box, in place, as AutoAttack does: an allowed image,
        though not the nearest one."""
        threat = self.threat

        def inside(z: Tensor) -> Tensor:
            z.sub_(x)
            shrink = (threat.eps / _norm(z).clamp_min(1e-30)).clamp_max_(1)
            return z.mul_(shrink).add_(x).clamp_(threat.low, threat.high)

        return inside

    # L1: sparse steps; sparsity and step size follow the perturbation of the best iterate

    @property
    def _warm(self) -> int:
        """Steps in the ball of 3 eps, and again in that of 2 eps."""
        if self.threat.norm != "L1" or self.large_eps is False:
            return 0
        return min(math.ceil(3 * self.steps / 10), (self.steps - 1) // 2)

    def _phase(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) steps since the ball last shrank, (N,) its radius now in eps."""
        shrunk = (step >= self._warm).long() + (step >= 2 * self._warm)
        return step - shrunk * self._warm, 3 - shrunk

    def _adapt_sparsity(self, units: Units) -> Tensor:
        """Every few steps, (N,) bool: the perturbation became sparser; go back to the best."""
        state = units.state
        since, scale = self._phase(units.step)
        period = torch.where(scale == 1, _l1_period(self.steps - 2 * self._warm),
                             _l1_period(self._warm))
        first = since == 0
        check = (since % period == 0) & ~first
        support = (state["x_best"] != units.x).flatten(1).sum(1)
        sparser = check & (support < 0.95 * state["support"])
        largest = scale.to(state["size"].dtype) * self.threat.eps
        size = torch.where(check, (state["size"] / 1.5).maximum(largest / 10), state["size"])
        state["size"] = torch.where(sparser | first, largest, size)
        # A run that starts from an earlier one takes its sparsity from there.
        known = check | first if self._warm else check
        state["support"] = torch.where(known, support, state["support"])
        kept = ((2 * support + 2) // 3).clamp_min(1)
        state["kept"] = torch.where(known, kept, state["kept"])
        return sparser

    def _move_sparsely(self, units: Units, here: Tensor, grad: Tensor) -> Tensor:
        """A step along the signs of the largest entries, or into the next smaller ball."""
        state, size = units.state, grad.abs()
        ranked = size.flatten(1).sort(1).values
        least = ranked.gather(1, ranked.shape[1] - state["kept"][:, None])
        signs = grad.sign_() * (size >= per_image(least[:, 0]))
        count = signs.abs().sum((1, 2, 3)).clamp_min(1)
        ahead = torch.addcmul(here, per_image(state["size"] / count), signs)
        if not self._warm:
            return self.threat.project(ahead, units.x)
        since, scale = self._phase(units.step + 1)
        turn = since == 0
        state["best"] = torch.where(turn, -torch.inf, state["best"])
        ahead = torch.where(per_image(turn), state["x_best"], ahead)
        return self._project(ahead, units.x, scale)

    def _project(self, z: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        """Into balls of scale (N,) times eps: 1, 2 or 3."""
        inside = self.threat.project(z, x)
        for factor in (2, 3):
            larger = self.threat.scaled(factor).project(z, x)
            inside = torch.where(per_image(scale == factor), larger, inside)
        return inside


def _norm(x: Tensor) -> Tensor:
    """L2 norms of (N, C, H, W), as (N, 1, 1, 1)."""
    return per_image(lengths("L2", x.flatten(1)))


def _l1_period(steps: int) -> int:
    return max(int(0.04 * steps), 1)


def _by_norm(given: int | None, threat: ThreatModel, l1: int, other: int) -> int:
    """AutoAttack's default where none is given."""
    return given if given is not None else l1 if threat.norm == "L1" else other


@ATTACKS.register("apgd-ce", description="Auto-PGD on the cross-entropy", paper=_PAPER)
def apgd_ce(
    threat: ThreatModel, steps: int = 100, restarts: int | None = None, eot: int = 1,
    rho: float = 0.75, large_eps: bool | None = None, precision: Precision = "exact",
) -> Attack:
    """As in AutoAttack: restarts None means 1, and 5 in L1."""
    return APGD(threat, "ce", steps, _by_norm(restarts, threat, 5, 1), eot=eot, rho=rho,
                large_eps=large_eps, precision=precision)


@ATTACKS.register("apgd-dlr", description="Auto-PGD on the difference of logits ratio",
                  paper=_PAPER)
def apgd_dlr(
    threat: ThreatModel, steps: int = 100, restarts: int | None = None, eot: int = 1,
    rho: float = 0.75, large_eps: bool | None = None, precision: Precision = "exact",
) -> Attack:
    """As in AutoAttack: restarts None means 1, and 5 in L1."""
    return APGD(threat, "dlr", steps, _by_norm(restarts, threat, 5, 1), eot=eot, rho=rho,
                large_eps=large_eps, precision=precision)


@ATTACKS.register(
    "apgd-t",
    description="Auto-PGD on the targeted difference of logits ratio, target by target",
    paper=_PAPER,
)
def apgd_t(
    threat: ThreatModel, steps: int = 100, targets: int | None = None, restarts: int = 1,
    eot: int = 1, rho: float = 0.75, large_eps: bool | None = None, precision: Precision = "exact",
) -> Attack:
    """As in AutoAttack: targets None means 9, and 5 in L1."""
    return APGD(threat, "targeted-dlr", steps, restarts, _by_norm(targets, threat, 5, 9), eot,
                rho, large_eps, precision=precision)
