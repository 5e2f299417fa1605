"""Attacks of torchattacks (Kim 2020, arXiv 2010.01950) by class name: `torchattacks:MIFGSM`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from robench.attacks.adapters import Shield, allowed, draw_seed, isolated, library
from robench.attacks.base import ADAPTERS, Attack, Classifier
from robench.attacks.threat import ThreatModel
from robench.errors import UsageError
from robench.registry import unknown

# What the caller's threat model decides; PIFGSM and PIFGSMPP call eps max_epsilon.
EPS = ("eps", "max_epsilon")
RESERVED = ("self", "model", "norm", *EPS)
# FAB's docstring names L1 too, but version 3.5.1 fails there on an unset variable.
NORMS = {"FAB": ["Linf", "L2"]}
# Targeted DLR divides by a difference with the fourth largest logit.
MIN_CLASSES = {"APGDT": 4, "AutoAttack": 4}
NOTES = {
    "AutoAttack": "10 iterations of APGD, APGD-T and FAB-T where the original has 100, and K - 1 "
    "targets where it has 9",
    "APGDT": "K - 1 targets where the original has 9",
    "CW": "no binary search for c, which the original has",
}
TEN_STEPS = ("APGD", "APGDT", "FAB")  # by default


@dataclass(frozen=True, slots=True)
class TorchAttack:
    """An attack of torchattacks, built anew for every call.

    Differs from the originals of the same name: AutoAttack, APGD, APGDT and FAB run 10
    iterations and not 100 (`notes` says so); step sizes keep the library's defaults, made for
    Linf:8/255, at any eps; PGD and its kin return the last iterate, not an earlier adversarial
    one. Minimum-norm attacks (CW, DeepFool, EADL1, EADEN) know no eps: their examples are
    projected. The seeds of APGD, FAB, Square and AutoAttack come from torch's generator.

    Attributes:
        threat: gives eps and norm to the attack where it takes them.
        name: class of torchattacks.
        options: other arguments of its constructor.
        notes: how the attack deviates from what its name promises.
    """

    threat: ThreatModel
    name: str
    options: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def __call__(self, model: Classifier, x: Tensor, y: Tensor) -> Tensor:
        if not len(x):
            return x.detach().clone()
        seed = draw_seed()
        with isolated(model, seed):
            shield = Shield(model, x)
            chosen: dict[str, Any] = {"seed": seed}
            if "n_classes" in self._parameters:
                with torch.no_grad():
                    chosen["n_classes"] = shield(x[:1].float()).shape[1]
                self._check_classes(chosen["n_classes"])
            attack = self._build(shield, chosen)
            x_adv = attack(x.detach().float().contiguous().clone(), y.clone())
        return allowed(x_adv, x.detach(), self.threat)

    @property
    def _class(self) -> Any:
        return getattr(library("torchattacks"), self.name)

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self._class.__init__).parameters

    def _build(self, shield: Shield, chosen: Mapping[str, Any]) -> Any:
        """The library's object. `chosen` holds defaults of ours, used where it knows them."""
        threat = {"norm": self.threat.norm, **dict.fromkeys(EPS, self.threat.eps)}
        known = {k: v for k, v in (threat | dict(chosen)).items() if k in self._parameters}
        return self._class(shield, **known | dict(self.options))

    def _check_classes(self, classes: int) -> None:
        needed = MIN_CLASSES.get(self.name, 2)
        if classes < needed:
            raise UsageError(
                f"torchattacks:{self.name} needs at least {needed} classes, not {classes}"
            )


@ADAPTERS.register(
    "torchattacks",
    description="any attack of torchattacks by class name: torchattacks:MIFGSM",
    paper="Kim 2020, arXiv 2010.01950",
)
def make(name: str, threat: ThreatModel, /, **options: Any) -> Attack:
    """Build `torchattacks:<name>`.

    Raises UsageError: torchattacks is missing, has no such attack or option, cannot construct
    it, or made it for another norm.
    """
    module = library("torchattacks")
    known = sorted(set(module.__all__) - set(module.__wrapper__))
    if name not in known:  # wrappers take attacks or data loaders, which no name can give
        raise unknown("attack", name, known)
    cls = getattr(module, name)
    names = [p for p in inspect.signature(cls.__init__).parameters if p not in RESERVED]
    for option in options:
        if option not in names:
            raise UsageError(f"torchattacks:{name} has no option {option!r}; it has "
                             f"{', '.join(names) or 'none'}")
    declared = NORMS.get(name, _norms(cls))
    if declared and threat.norm not in declared:
        raise UsageError(f"torchattacks:{name} is an attack for {' and '.join(declared)}, "
                         f"not for {threat}")
    attack = TorchAttack(threat, name, options)
    try:
        built = attack._build(Shield(lambda z: z, torch.zeros(())), {})
    except Exception as error:  # whatever the constructor thinks of the options
        text = " ".join(str(error).split())
        raise UsageError(f"torchattacks:{name}: {type(error).__name__}: {text}") from None
    return replace(attack, notes=_notes(name, options, built))


def _norms(cls: Any) -> list[str]:
    """["Linf", "L2"] from the docstring's line "Distance Measure : Linf, L2"; [] without one."""
    line = re.search(r"Distance Measure\s*:(.*)", inspect.getdoc(cls) or "")
    return re.findall(r"L(?:inf|\d)", line[1]) if line else []


def _notes(name: str, options: Mapping[str, Any], built: Any) -> tuple[str, ...]:
    notes = [NOTES[name]] if name in NOTES else []
    if name in TEN_STEPS and "steps" not in options:
        notes.append("10 iterations where the original has 100")
    steps, alpha, eps = (getattr(built, key, None) for key in ("steps", "alpha", "eps"))
    if steps and alpha and eps and steps * alpha < eps * (1 - 1e-6):
        notes.append(f"{steps} steps of alpha = {alpha:g} end inside the ball of eps = {eps:g}")
    return tuple(notes)
