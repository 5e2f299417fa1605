"""What a defense is: how it crafts its training examples, and what it minimizes on them."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robench.attacks.ascent import Ascent, Start
from robench.attacks.base import Mode, frozen
from robench.attacks.threat import ThreatModel
from robench.options import checked
from robench.registry import Registry

Nets = Mapping[str, nn.Module]  # "student", and "teacher" or "peer" where a method needs one


@dataclass(slots=True)
class Losses:
    """The outcome of one outer step: named terms, weighted, whose sum is minimized."""

    parts: dict[str, Tensor]  # () each, logged

    @property
    def total(self) -> Tensor:
        """The one scalar that is backpropagated."""
        return torch.stack(list(self.parts.values())).sum()


class Defense(ABC):
    """A training method. Subclasses are frozen dataclasses whose fields are the method's knobs.

    `trained` networks get one optimizer each and are in train mode during `loss`; networks in
    `given` are frozen and in eval mode throughout. `given` names, for each, the defense by which
    the matrix trains one if the user brings none.
    """

    trained: ClassVar[tuple[str, ...]] = ("student",)
    given: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        """Inner maximization: the batch (N, C, H, W) the outer step trains on, detached."""

    @abstractmethod
    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        """Outer minimization. Touches no optimizer and no mode."""

    @contextmanager
    def perturbed(self, nets: Nets, objective: Callable[[Nets], Losses]) -> Iterator[None]:
        """Weights may be displaced while the gradient is taken (AWP, SAM). Default: not."""
        yield

    def at(self, share: float) -> Defense:
        """The defense at this share of the training, 0 <= share < 1: for schedules.

        A schedule of eps or of a weight returns `dataclasses.replace(self, ...)`. Default: self.
        """
        return self

    def after_step(self, nets: Nets, x: Tensor, y: Tensor) -> None:  # noqa: B027
        """Called when the optimizers have stepped. Default: nothing."""


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
    """

    threat: ThreatModel
    steps: int = 10
    step_size: float | None = None
    start: Start = "normal"
    clamp_start: bool = False
    craft_mode: Mode = "eval"

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


def make_defense(name: str, threat: ThreatModel, /, **options: Any) -> Defense:
    """Build a defense by name. Raises UsageError for an unknown name, option or kind of value."""
    cls = DEFENSES[name].value
    made = checked(options, cls, "defense", name)
    if any(field.name == "threat" for field in fields(cls)):  # type: ignore[arg-type]
        made["threat"] = threat
    return cls(**made)
