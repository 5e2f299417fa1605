"""AutoAttack, the ensemble of Croce and Hein 2020, as stages of the pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from robench.attacks.apgd import APGD
from robench.attacks.base import ATTACKS, Attack
from robench.attacks.fab import FAB
from robench.attacks.network import Precision
from robench.attacks.search import OneStage, Pooled, Stage
from robench.attacks.square import Square
from robench.attacks.threat import ThreatModel
from robench.errors import UsageError

Version = Literal["standard", "plus", "rand", "lite"]


@dataclass(frozen=True, slots=True)
class AutoAttack(Pooled):
    """Every part starts from the clean image; an image is robust if it withstands all of them.

    Attributes:
        version: "standard": APGD-CE, targeted APGD-DLR, targeted FAB, Square. "plus": APGD-CE
            and APGD-DLR with 5 restarts, FAB with 5 restarts, Square, and the targeted parts.
            "rand", for randomized defenses: APGD-CE and APGD-DLR, gradients averaged over 20
            passes. "lite" is not AutoAttack: its two APGD parts on all images, FAB-T and Square
            on a random share of those that stand, to see whether they would find more.
        share: of the images that stand, for "lite".
    """

    threat: ThreatModel
    version: Version = "standard"
    share: float = 0.1

    def __post_init__(self) -> None:
        if self.version not in get_args(Version):
            raise UsageError(f"AutoAttack has the versions {', '.join(get_args(Version))}, "
                             f"not {self.version!r}")
        if not 0 <= self.share <= 1:
            raise UsageError(f"share must be in [0, 1], not {self.share}")

    def _parts(self) -> list[OneStage]:
        threat = self.threat
        # The reference uses the larger eps of L1 in `standard` only.
        if self.version == "rand":
            return [APGD(threat, "ce", eot=20, large_eps=False),
                    APGD(threat, "dlr", eot=20, large_eps=False)]
        if self.version == "plus":
            return [APGD(threat, "ce", restarts=5, large_eps=False),
                    APGD(threat, "dlr", restarts=5, large_eps=False),
                    FAB(threat, targeted=False, restarts=5), Square(threat),
                    APGD(threat, "targeted-dlr", large_eps=False), FAB(threat)]
        if threat.norm == "L1":
            return [APGD(threat, "ce", restarts=5), APGD(threat, "targeted-dlr", targets=5),
                    FAB(threat), Square(threat)]
        return [APGD(threat, "ce"), APGD(threat, "targeted-dlr"), FAB(threat), Square(threat)]

    def stages(self, classes: int) -> tuple[Stage, ...]:
        parts = [stage for part in self._parts() for stage in part.stages(classes)]
        if self.version != "lite":
            return tuple(parts)
        return tuple(Stage(part.stepper, self.share) if part.stepper.name in ("fab-t", "square")
                     else part for part in parts)

    def notes(self, classes: int) -> tuple[str, ...]:
        found = [note for part in self._parts() for note in part.notes(classes)]
        if self.version == "lite":
            found.insert(0, "autoattack-lite is not AutoAttack: FAB-T and Square see a share only")
        return tuple(dict.fromkeys(found))


def _register(version: Version, description: str) -> None:
    name = "autoattack" if version == "standard" else f"autoattack-{version}"

    @ATTACKS.register(name, description=description, paper=_PAPER)
    def make(threat: ThreatModel, precision: Precision = "exact") -> Attack:
        return AutoAttack(threat, version, precision=precision)


_PAPER = "Croce and Hein 2020, arXiv 2003.01690; L1: Croce and Hein 2021, arXiv 2103.01208"
_register("standard", "AutoAttack: APGD-CE, APGD-T, FAB-T, Square")
_register("plus", "AutoAttack plus: 5 restarts, APGD-DLR and untargeted FAB too")
_register("rand", "AutoAttack for randomized defenses: gradients over 20 passes")


@ATTACKS.register("autoattack-lite", paper=_PAPER, description="not AutoAttack: APGD-CE and "
                  "APGD-T, with FAB-T and Square on a share as a check")
def lite(threat: ThreatModel, share: float = 0.1, precision: Precision = "exact") -> Attack:
    return AutoAttack(threat, "lite", share, precision=precision)
