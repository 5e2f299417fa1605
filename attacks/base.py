"""What an attack is, the registry of attacks, and `frozen`, under which all of them craft."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from robench.attacks.threat import ThreatModel
from robench.options import checked
from robench.registry import Registry, unknown

# (N, C, H, W) in [0, 1] -> logits (N, K); normalization is inside. Usually an nn.Module.
Classifier = Callable[[Tensor], Tensor]
Mode = Literal["eval", "train"]


class Attack(Protocol):
    """Searches for adversarial examples inside `threat`."""

    @property
    def threat(self) -> ThreatModel: ...

    def __call__(self, model: Classifier, x: Tensor, y: Tensor) -> Tensor:
        """Attack a batch.

        Args:
            model: images to logits; its mode, gradients and hooks are left as they were.
            x: (N, C, H, W) float images in [0, 1].
            y: (N,) int64 true labels.

        Returns:
            x_adv: same shape, dtype and device as x, detached, inside the threat model. Where
            an iterate was misclassified that iterate, else the last one. Random starts are
            drawn from torch's global generator.
        """


def _builtin() -> None:
    for name in ("gradient", "apgd", "fab", "square", "minimum", "autoattack", "union"):
        importlib.import_module(f"robench.attacks.{name}")


def _adapters() -> None:
    importlib.import_module("robench.attacks.adapters.torchattacks")
    importlib.import_module("robench.attacks.adapters.pyautoattack")


# name -> class or function (threat, **options) -> Attack
ATTACKS: Registry[Callable[..., Attack]] = Registry("attack", "robench.attacks", _builtin)
# prefix -> function (name, threat, **options) -> Attack, for names like torchattacks:MIFGSM
ADAPTERS: Registry[Callable[..., Attack]] = Registry("attack adapter", None, _adapters)


def make_attack(name: str, threat: ThreatModel, /, **options: Any) -> Attack:
    """Build an attack by name: "pgd", "pgd-50" (50 steps), "torchattacks:MIFGSM".

    Raises UsageError for an unknown name or an option that the attack does not have.
    """
    prefix, colon, rest = name.partition(":")
    if colon:
        factory: Callable[..., Attack] = ADAPTERS[prefix].value
        return factory(rest, threat, **options)
    if name not in ATTACKS:
        short = re.fullmatch(r"(.+)-(\d+)", name)
        if short is None or short[1] not in ATTACKS:
            raise unknown("attack", name, ATTACKS.names())
        name, options = short[1], {"steps": int(short[2]), **options}
    factory = ATTACKS[name].value
    return factory(threat, **checked(options, factory, "attack", name))


def memory_format(net: Classifier) -> torch.memory_format:
    """The layout in which a network wants its images: channels_last if its weights are so."""
    weights = net.parameters() if isinstance(net, nn.Module) else ()
    last = any(w.ndim == 4 and not w.is_contiguous()
               and w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    return torch.channels_last if last else torch.contiguous_format


@contextmanager
def frozen(*nets: Classifier, mode: Mode = "eval") -> Iterator[None]:
    """Hold networks still while examples are crafted against them.

    Inside: every sub-module is in `mode`, no parameter asks for a gradient, so that a backward
    pass reaches the images alone. Afterwards each sub-module's own mode and each parameter's
    own flag are back, also after an exception. In mode "train" batch-norm uses and updates
    batch statistics, as ARD and Rice et al. do while crafting.
    """
    modules = [module for net in nets if isinstance(net, nn.Module) for module in net.modules()]
    parameters = [p for net in nets if isinstance(net, nn.Module) for p in net.parameters()]
    modes = [module.training for module in modules]
    flags = [p.requires_grad for p in parameters]
    try:
        for module in modules:
            module.training = mode == "train"
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)
