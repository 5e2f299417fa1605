"""Union: AutoAttack under several threat models; robust is what withstands all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robench.attacks.autoattack import AutoAttack
from robench.attacks.base import ATTACKS, Attack, Classifier
from robench.attacks.network import Network, Precision
from robench.attacks.pool import State, Step, Stepper, Units, per_image
from robench.attacks.search import Pooled, Stage
from robench.attacks.threat import ThreatModel
from robench.attacks.verify import ABSOLUTE, RELATIVE
from robench.errors import UsageError


@dataclass(frozen=True, slots=True)
class Under:
    """A stepper that says under which threat model it works."""

    inner: Stepper

    @property
    def name(self) -> str:
        return f"{self.inner.threat} {self.inner.name}"

    @property
    def threat(self) -> ThreatModel:
        return self.inner.threat

    @property
    def steps(self) -> int:
        return self.inner.steps

    @property
    def unseen_end(self) -> bool:
        return self.inner.unseen_end

    def units(self, classes: int) -> int:
        return self.inner.units(classes)

    def rank(self, number: int) -> int:
        return self.inner.rank(number)

    def begin(self, units: Units) -> State:
        return self.inner.begin(units)

    def step(self, net: Network, units: Units) -> Step:
        return self.inner.step(net, units)


@dataclass(frozen=True, slots=True)
class Union(Pooled):
    """AutoAttack under `threat`, then, on the images that stand, under each of the `others`.

    An example of another threat model counts with its distance times the ratio of the two eps.
    """

    threat: ThreatModel
    others: tuple[ThreatModel, ...] = ()

    def __post_init__(self) -> None:
        threats = [self.threat, *self.others]
        if len(set(threats)) < len(threats):
            raise UsageError(f"union: {', '.join(map(str, threats))} are not different")
        if not all(other.eps for other in self.others):  # distances are shares of it
            raise UsageError("union: name other threat models whose eps is above 0")

    def __call__(self, model: Classifier, x: Tensor, y: Tensor) -> Tensor:
        """The examples under `threat` alone; for what the others find see `Search`."""
        x_adv = Pooled.__call__(self, model, x, y)
        inside = self.threat.distance(x_adv, x) <= self.threat.eps * (1 + RELATIVE) + ABSOLUTE
        return torch.where(per_image(inside), x_adv, x)

    def _parts(self) -> list[AutoAttack]:
        return [AutoAttack(threat) for threat in (self.threat, *self.others)]

    def stages(self, classes: int) -> tuple[Stage, ...]:
        return tuple(Stage(Under(stage.stepper), stage.share)
                     for part in self._parts() for stage in part.stages(classes))

    def notes(self, classes: int) -> tuple[str, ...]:
        return tuple(dict.fromkeys(note for part in self._parts() for note in part.notes(classes)))


def joint(attack: Attack, threat: ThreatModel) -> str:
    """All that an attack works under, as records name it: "Linf:8/255", or of a union
    "Linf:8/255+L2:0.5", which no table puts beside the former."""
    return "+".join(map(str, threats_of(attack, threat)))


def threats_of(attack: Attack, threat: ThreatModel) -> tuple[ThreatModel, ...]:
    """The threat models an attack works under, that of the run first."""
    return (threat, *(attack.others if isinstance(attack, Union) else ()))


@ATTACKS.register(
    "union",
    description="AutoAttack under several threat models: robust is what withstands all of them",
    paper="Tramer and Boneh 2019, arXiv 1904.13000",
)
def union(
    threat: ThreatModel, also: str = "L2:0.5+L1:12", precision: Precision = "exact"
) -> Attack:
    """also: the threat models beside that of the run, with a + between them."""
    others = tuple(ThreatModel.parse(text) for text in also.split("+"))
    return Union(threat, tuple(other for other in others if other != threat), precision=precision)
