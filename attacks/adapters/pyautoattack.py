"""pyautoattack, the reference AutoAttack (Croce and Hein 2020): `pyautoattack:standard`."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from robench.attacks.adapters import Shield, allowed, draw_seed, isolated, library, logged_warnings
from robench.attacks.base import ADAPTERS, Attack, Classifier
from robench.attacks.threat import ThreatModel
from robench.errors import UsageError
from robench.registry import unknown

VERSIONS = ("standard", "plus", "rand")
# Each part with the smallest number of classes for which its loss is defined.
PARTS = {"apgd-ce": 2, "apgd-dlr": 3, "apgd-t": 4, "fab": 2, "fab-t": 2, "square": 2}


@dataclass(frozen=True, slots=True)
class PyAutoAttack:
    """AutoAttack's reference implementation on one batch.

    Differs from the original: with K < 10 classes the targeted parts have K - 1 targets, where
    the original asks for targets that do not exist; parts whose loss is undefined (DLR with
    K = 2, targeted DLR with K < 4) are left out, and `notes` names them. A single part runs
    with the settings it has in `standard`: 1 restart, in L1 5 for apgd-ce. The checks of the
    defense (randomized, probabilities, zero gradients, Square) see every batch; what they
    find is in `notes`.

    Attributes:
        threat: gives eps and norm.
        name: a version (standard, plus, rand) or a part (apgd-ce, square, ...).
        seed: None draws one per call from torch's global generator.
        library: its version.
    """

    threat: ThreatModel
    name: str
    seed: int | None = None
    library: str = field(default_factory=lambda: version("pyautoattack"), init=False)
    _notes: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the last call left out, and what the library's checks found, a sentence each."""
        return tuple(self._notes)

    def __call__(self, model: Classifier, x: Tensor, y: Tensor) -> Tensor:
        if not len(x):
            return x.detach().clone()
        seed = draw_seed() if self.seed is None else self.seed
        with isolated(model, seed), logged_warnings("auto-attack") as warnings:
            attack = self._build(Shield(model, x), x.detach().float(), seed)
            x_adv, _ = attack.run_standard_evaluation(
                x.detach().float().contiguous().clone(), y.clone(), batch_size=len(x)
            )
        self._notes.extend(warnings)
        return allowed(x_adv, x.detach(), self.threat)

    def _build(self, shield: Shield, x: Tensor, seed: int) -> Any:
        """The library's object, fitted to the number of classes that the model has."""
        with torch.no_grad():
            classes = shield(x[:1]).shape[1]
        attack = library("pyautoattack").AutoAttack(
            shield,
            norm=self.threat.norm,
            eps=self.threat.eps,
            seed=seed,
            version=self.name if self.name in VERSIONS else "standard",
            device=x.device,
        )
        if self.name in PARTS:
            attack.attacks_to_run = [self.name]
        left_out = [part for part in attack.attacks_to_run if classes < PARTS[part]]
        attack.attacks_to_run = [p for p in attack.attacks_to_run if p not in left_out]
        if not attack.attacks_to_run:
            raise UsageError(f"pyautoattack:{self.name} needs at least {PARTS[self.name]} "
                             f"classes, not {classes}")
        self._notes[:] = [
            f"{part} was left out: it needs at least {PARTS[part]} classes, not {classes}"
            for part in left_out
        ]
        for part in (attack.apgd_targeted, attack.fab):
            part.n_target_classes = min(part.n_target_classes, classes - 1)
        return attack


@ADAPTERS.register(
    "pyautoattack",
    description="the reference AutoAttack or one of its parts: pyautoattack:standard",
    paper="Croce and Hein 2020, arXiv 2003.01690",
)
def make(name: str, threat: ThreatModel, /, **options: Any) -> Attack:
    """Build `pyautoattack:<name>`. Raises UsageError: it is missing, or no such name or option."""
    library("pyautoattack")
    if name not in (*VERSIONS, *PARTS):
        raise unknown("attack", name, (*VERSIONS, *PARTS))
    for option in options:
        if option != "seed":
            raise UsageError(f"pyautoattack:{name} has no option {option!r}; it has seed")
    return PyAutoAttack(threat, name, **options)
