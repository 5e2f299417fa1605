"""Networks by name: robench's own, or any factory that can be imported."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from robench.errors import UsageError, one_line
from robench.registry import Registry, unknown

# name -> function (classes, channels, size: those that it needs) -> network
MODELS: Registry[Callable[..., nn.Module]] = Registry("model")

# Mean and standard deviation of the training images, per channel, as Rice et al. 2020
# (robust_overfitting) and those who built on them wrote them down.
NORMALIZE: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": (
        (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
        (0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
    ),
}


class Normalize(nn.Module):
    """(x - mean) / std per channel, as the first layer: the adversary still works in [0, 1]."""

    mean: Tensor  # (1, C, 1, 1)
    std: Tensor  # (1, C, 1, 1)

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # Buffers move with the network and are saved with it.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def build_model(
    name: str, *, classes: int, channels: int, size: int, normalize: str | None = None
) -> nn.Module:
    """A freshly initialized network, from torch's global generator.

    Args:
        name: a name in MODELS, or package.module:factory, see load_factory.
        classes: the number of logits K.
        channels: of the images, 1 or 3.
        size: height and width of the images in pixels.
        normalize: a name in NORMALIZE, whose constants become the first layer; None: no layer.

    A factory is called with those of the keywords classes, channels and size that its signature
    takes. Raises UsageError for an unknown name, for whatever goes wrong in a factory, and if
    it returns anything but an nn.Module.
    """
    factory = load_factory(name)
    offered = {"classes": classes, "channels": channels, "size": size}
    try:
        network = factory(**_accepted(factory, offered))
    except UsageError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise UsageError(f"model {name!r} could not be built: {one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"model {name!r}: the factory returned {type(network).__name__}, not an nn.Module"
        )
    if normalize is None:
        return network
    if normalize not in NORMALIZE:
        raise unknown("normalization", normalize, NORMALIZE)
    mean, std = NORMALIZE[normalize]
    if channels != len(mean):
        raise UsageError(
            f"normalization {normalize!r} is for {len(mean)} channels, the images have {channels}"
        )
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), network=network))


def load_factory(name: str) -> Callable[..., nn.Module]:
    """The function that builds the network.

    A name with a colon, package.module:factory, is imported; modules in the current directory
    are found, too. Raises UsageError if there is no such model, module or attribute.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon:
        return MODELS[name].value
    # An installed console script does not search the current directory, `python -m` does.
    sys.path.insert(0, "")
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module's own code raises
        raise UsageError(
            f"model {name!r}: cannot import {module_name!r}: {one_line(error)}"
        ) from error
    finally:
        sys.path.remove("")
    try:
        factory = attrgetter(attribute)(module)
    except AttributeError:
        raise UsageError(f"model {name!r}: module {module_name} has no {attribute!r}") from None
    if not callable(factory):
        raise UsageError(f"model {name!r}: {attribute} is not a function or class")
    made: Callable[..., nn.Module] = factory
    return made


def _accepted(function: Callable[..., Any], offered: dict[str, int]) -> dict[str, int]:
    """Those of the offered keywords that the function takes; all of them if it has **kwargs."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return offered
    named = {p.name for p in parameters.values() if p.kind is not p.POSITIONAL_ONLY}
    return {key: value for key, value in offered.items() if key in named}


def source_hash(network: nn.Module, factory: str) -> str:
    """A hash of what a user's network is made of: its layers, and the source of its own classes.

    What a forward calls outside of these classes is not seen.
    """
    parts = [repr(network), _source(load_factory(factory))]
    classes = {type(module) for module in network.modules()}
    own = [c for c in classes if not c.__module__.startswith(("torch.", "robench."))]
    parts += [_source(c) for c in sorted(own, key=lambda c: c.__qualname__)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # typed in, or compiled
        return getattr(thing, "__qualname__", type(thing).__qualname__)
