"""What a defense is: how it crafts its training examples, and what it minimizes on them."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.attacks.ascent import Ascent, Start
from robench.attacks.base import Mode, frozen
from robench.attacks.objectives import ce, kl
from robench.attacks.threat import ThreatModel
from robench.options import checked
from robench.registry import Registry

Nets = Mapping[str, nn.Module]  # "student", and "teacher" or "peer" where a method needs one


class Moment(NamedTuple):
    """Where a training is: in step `step` (of `steps`) of epoch `epoch` (of `epochs`), from 0.

    lr_share: the learning rate of this step as a share of the highest one.
    """

    epoch: int
    epochs: int
    step: int = 0
    steps: int = 1
    lr_share: float = 1.0

    @property
    def share(self) -> float:
        """Of the training that is over, in [0, 1)."""
        return (self.epoch + self.step / self.steps) / self.epochs

    def reached(self, point: float) -> bool:
        """Whether epoch `point` has begun; strictly between 0 and 1 it is a share of all epochs."""
        return self.epoch >= (int(point * self.epochs) if 0 < point < 1 else point)


@dataclass(slots=True)
class Losses:
    """The outcome of one outer step: named terms, weighted, whose sum is minimized.

    Attributes:
        parts: () each, logged.
        seen: detached values that `after_step` wants: means over the batch, of less than two
            dimensions, and tables with a row for each image.
    """

    parts: dict[str, Tensor]
    seen: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """The one scalar that is backpropagated."""
        return torch.stack(list(self.parts.values())).sum()


class Defense(ABC):
    """A training method. Subclasses are frozen dataclasses whose fields are the method's knobs.

    `trained` networks get one optimizer each and are in train mode during `loss`; networks in
    `given` are frozen and in eval mode throughout. `given` names, for each, the defense by which
    the matrix trains one if the user brings none. What a method must remember from step to step
    lies in modules of `memory`, which are saved with the state of the training.
    """

    trained: ClassVar[tuple[str, ...]] = ("student",)
    given: ClassVar[Mapping[str, str]] = {}

    def memory(self, nets: Nets, classes: int) -> Mapping[str, nn.Module]:
        """More entries of `nets`, made once: an average of the student, running weights.

        Nobody trains them; the method itself changes them in `after_step` and `after_epoch`.
        Default: none.
        """
        return {}

    @abstractmethod
    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        """Inner maximization: the batch the outer step trains on, detached.

        (N, C, H, W); a method that attacks two networks returns (2N, C, H, W), one after another.
        """

    @abstractmethod
    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        """Outer minimization. Touches no optimizer, no mode and no memory."""

    @contextmanager
    def perturbed(self, nets: Nets, objective: Callable[[Nets], Losses]) -> Iterator[None]:
        """Weights may be displaced while gradients are taken and optimizers step (AWP, SAM)."""
        yield

    def begun(self, now: Moment) -> bool:
        """Whether it is more than the method that it starts out as. Default: always."""
        return True

    def at(self, now: Moment) -> Defense:
        """The defense for this step: for schedules.

        A schedule of eps or of a weight returns `dataclasses.replace(self, ...)`. Default: self.
        """
        return self

    def after_step(  # noqa: B027
        self, nets: Nets, x: Tensor, y: Tensor, losses: Losses
    ) -> None:
        """Called when the optimizers have stepped, without a graph. Default: nothing."""

    def after_epoch(self, nets: Nets) -> None:  # noqa: B027
        """Called at the end of an epoch, without a graph. Default: nothing."""


class Remembered(nn.Module):
    """A memory of plain tensors: `Remembered(weight=torch.ones(()))`, then `memory.weight`."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, value)


def take_step(
    defense: Defense,
    nets: Nets,
    optimizers: Collection[torch.optim.Optimizer],
    x: Tensor,
    y: Tensor,
    clip: float | None = None,
) -> Losses:
    """One training step on a batch, with the defense of this moment.

    Args:
        optimizers: of the trained networks; these are in train mode.
        clip: the largest length of the gradient of each network; None: any.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    x_adv = defense.craft(nets, x, y)

    def objective(nets: Nets) -> Losses:
        return defense.loss(nets, x, x_adv, y)

    with defense.perturbed(nets, objective):
        losses = objective(nets)
        losses.total.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            if clip is not None:
                for group in optimizer.param_groups:
                    nn.utils.clip_grad_norm_(group["params"], clip)
            optimizer.step()
    with torch.no_grad():
        defense.after_step(nets, x, y, losses)
    return losses


@dataclass(frozen=True, kw_only=True)
class Adversarial(Defense):
    """A defense that crafts with `Ascent`. Methods differ in the start and the mode.

    Attributes:
        threat: the images it defends against.
        steps: ascent steps.
        step_size: in the unit of eps; None means eps / 4 (2/255 at 8/255).
        start: "uniform", "normal" or "none", see Ascent.
        clamp_start: see Ascent.
        craft_mode: mode of the attacked network while crafting. In "train" batch-norm uses
            batch statistics and updates its running ones at every ascent step.
        label_smoothing: of the labels in the outer loss; the attack sees the labels as they are.
    """

    threat: ThreatModel
    steps: int = 10
    step_size: float | None = None
    start: Start = "normal"
    clamp_start: bool = False
    craft_mode: Mode = "eval"
    label_smoothing: float = 0.0

    @property
    def ascent(self) -> Ascent:
        step_size = self.threat.eps / 4 if self.step_size is None else self.step_size
        return Ascent(self.threat, self.steps, step_size, self.start, self.clamp_start)

    def attack(
        self, net: nn.Module, x: Tensor, objective: Callable[[Tensor], Tensor], *others: nn.Module
    ) -> Tensor:
        """Maximize objective: images (N, C, H, W) -> (N,), around x, against `net`.

        `net` is held in `craft_mode` meanwhile, the `others` that the objective calls in eval.
        """
        with frozen(*others), frozen(net, mode=self.craft_mode):
            return self.ascent.maximize(objective, x)

    def attack_labels(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Maximize CE(net(x'), y)."""
        return self.attack(net, x, lambda z: ce(net(z), y))

    def attack_target(self, net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        """Maximize KL(target || net(x')), target being fixed logits (N, K)."""
        return self.attack(net, x, lambda z: kl(target, net(z)))

    def label_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of logits (N, K) with labels (N,), mean over the batch."""
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Wrapper(Defense):
    """A change to any defense, written `trades+NAME`; its own options are `NAME.option`."""

    kind: ClassVar[str]  # NAME
    inner: Defense

    @property
    def trained(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.trained

    @property
    def given(self) -> Mapping[str, str]:  # type: ignore[override]
        return self.inner.given

    def memory(self, nets: Nets, classes: int) -> Mapping[str, nn.Module]:
        return self.inner.memory(nets, classes)

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        return self.inner.craft(nets, x, y)

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        return self.inner.loss(nets, x, x_adv, y)

    def begun(self, now: Moment) -> bool:
        return self.inner.begun(now)

    def at(self, now: Moment) -> Defense:
        return replace(self, inner=self.inner.at(now))

    def after_step(self, nets: Nets, x: Tensor, y: Tensor, losses: Losses) -> None:
        self.inner.after_step(nets, x, y, losses)

    def after_epoch(self, nets: Nets) -> None:
        self.inner.after_epoch(nets)


def clean_logits(net: nn.Module, x: Tensor) -> Tensor:
    """(N, K) logits in eval mode, without gradient; the mode of `net` is restored."""
    with torch.no_grad(), frozen(net):
        logits: Tensor = net(x)
    return logits


def mean_over_classes(kl: Tensor, logits: Tensor) -> Tensor:
    """The `mean` reduction of torch's KLDivLoss: over the batch and the K classes.

    kl (N,) holds the per-image sums over classes, logits (N, K) tells K. 1/K of `batchmean`.
    """
    return kl.mean() / logits.shape[1]


def _builtin() -> None:
    importlib.import_module("robench.defenses")


DEFENSES: Registry[type[Defense]] = Registry("defense", "robench.defenses", _builtin)
WRAPPERS: Registry[type[Wrapper]] = Registry("wrapper", None, _builtin)


def make_defense(name: str, threat: ThreatModel, /, **options: Any) -> Defense:
    """Build a defense by name, `trades` or `trades+awp`.

    Raises UsageError for an unknown name, option or kind of value.
    """
    base, *wrappers = name.split("+")
    cls, own = DEFENSES[base].value, dict(options)
    around = []
    for wrapper in wrappers:
        mine = [option for option in own if option.startswith(f"{wrapper}.")]
        given = {option.removeprefix(f"{wrapper}."): own.pop(option) for option in mine}
        outer = WRAPPERS[wrapper].value
        around.append((outer, checked(given, outer, "wrapper", wrapper)))
    made = checked(own, cls, "defense", base)
    if any(field.name == "threat" for field in fields(cls)):  # type: ignore[arg-type]
        made["threat"] = threat
    defense = cls(**made)
    for outer, knobs in around:
        defense = outer(inner=defense, **knobs)
    return defense


def options_of(defense: Defense) -> dict[str, Any]:
    """Every knob, as make_defense takes it, those at their default too."""
    if isinstance(defense, Wrapper):
        own = {f"{defense.kind}.{field.name}": getattr(defense, field.name)
               for field in fields(defense) if field.name != "inner"}
        return options_of(defense.inner) | own
    options: dict[str, Any] = asdict(defense) if is_dataclass(defense) else {}
    return {name: value for name, value in options.items() if name != "threat"}
