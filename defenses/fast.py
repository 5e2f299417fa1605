"""Fast training: the networks of a defense computed in bfloat16, and nothing computed twice.

A defense is written for plain networks. `accelerated` puts a `View` in the place of each one:

    crafting, clean logits    a twin: batch-norm folded, channels_last, bfloat16
    outer passes              autocast to bfloat16; parameters and gradients stay in float32
    teacher(x) once more      the logits of before

Logits are float32, so that losses and softmax are, and so is the last linear layer. Images and
their gradients are float32, too. Nothing here waits for the device.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from robench.attacks.base import frozen
from robench.attacks.folding import close, folded, in_bf16, last_linear, look, repeats
from robench.attacks.verify import full_precision
from robench.randomness import seeded

Compute = Callable[[Tensor], Tensor]  # images (N, C, H, W) -> logits (N, K)
REMEMBERED = 2  # passes


def accelerated(
    nets: Mapping[str, nn.Module], precision: Literal["fp32", "bf16"], sample: Tensor
) -> dict[str, nn.Module]:
    """What a defense should see in the place of `nets`; in fp32, the networks themselves.

    Whatever is no float32 network that gives the same logits twice, or gives others in bfloat16,
    stays as it is. Steps must change the weights in place (not through `.data`), as optimizers
    do; fused ones hide it from `_version`.

    sample: (N, C, H, W) a few of the images, to try the views on.
    """
    if precision == "fp32":
        return dict(nets)
    return {name: _view(net, sample) for name, net in nets.items()}


class View(nn.Module):
    """A network that is computed in another way, in eval mode not twice for the same images.

    Modes, parameters and buffers are those of the network, which is a sub-module.
    """

    def __init__(self, net: nn.Module, compute: Compute) -> None:
        """compute: what the network does, in whatever mode it is; kept up to date by itself."""
        super().__init__()
        self.net, self.compute = net, compute
        self._changes = Changes(net)
        self._passes: deque[_Pass] = deque(maxlen=REMEMBERED)

    @property
    def training(self) -> bool:
        net: nn.Module = self.net
        return net.training

    @training.setter
    def training(self, mode: bool) -> None:
        """Nothing: whoever sets it sets that of the sub-modules, too."""

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, K)
        if torch.is_grad_enabled() or not _in_eval(self.net):
            return self.compute(x)
        changes = self._changes()
        for known in self._passes:
            if known.fits(x, changes):
                return known.logits
        logits = self.compute(x)
        self._passes.append(_Pass(x, x._version, changes, logits, logits._version))
        return logits

    def __deepcopy__(self, memo: dict[int, Any]) -> View:
        net = copy.deepcopy(self.net, memo)  # `compute` finds the copies of its tensors in memo
        return type(self)(net, copy.deepcopy(self.compute, memo))


class Changes:
    """How often the parameters and buffers of a network have been changed in place.

    The number of one `Changes` never equals that of another, a copy for example.
    """

    def __init__(self, net: nn.Module) -> None:
        self._tensors = [*net.parameters(), *net.buffers()]

    def __call__(self) -> tuple[int, int]:
        return id(self), sum(tensor._version for tensor in self._tensors)


class _Pass(NamedTuple):
    """A pass without gradient, and how often what belongs to it had been changed."""

    x: Tensor
    x_version: int
    changes: tuple[int, int]
    logits: Tensor
    logits_version: int

    def fits(self, x: Tensor, changes: tuple[int, int]) -> bool:
        return (self.x is x and self.x_version == x._version and self.changes == changes
                and self.logits_version == self.logits._version)


class Mixed:
    """A network in bfloat16: its twin where nobody asks for gradients of parameters, autocast
    elsewhere, or everywhere without a twin."""

    def __init__(self, net: nn.Module, twin: Twin | None) -> None:
        self._net, self._twin = net, twin
        self._parameters = list(net.parameters())
        last = last_linear(net)
        self._last = None if last is None else net.get_submodule(last)

    def __call__(self, x: Tensor) -> Tensor:
        if self._twin is not None and self._at_rest():
            return self._twin(x)
        with torch.autocast(x.device.type, torch.bfloat16), _in_float32(self._last):
            logits: Tensor = self._net(x)
        return logits.float()

    def _at_rest(self) -> bool:
        asked = torch.is_grad_enabled() and any(p.requires_grad for p in self._parameters)
        return not asked and _in_eval(self._net)


class Twin:
    """A traced copy of a network in eval mode, for gradients of the images alone.

    Batch-norm is folded into convolutions, w gamma / sqrt(var + eps) in float32, then rounded.
    A pass after the original has changed takes over its weights and statistics first.
    """

    def __init__(self, net: nn.Module, sample: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        """dtype: bfloat16, the last linear layer in float32; or float32.

        Raises something if the network cannot be traced, or not together with its weights.
        """
        model, folds = folded(net)
        if dtype == torch.bfloat16:
            in_bf16(model, sample)
        self._model = model.requires_grad_(False).to(memory_format=torch.channels_last)
        self._dtype = dtype
        self._folds: list[tuple[Any, ...]] = [
            (model.get_submodule(conv), net.get_submodule(conv), net.get_submodule(norm))
            for conv, norm in folds.items()]
        originals = _tensors(net)
        # A KeyError: tracing has made a constant of something that may depend on the weights.
        self._copies = [(mine, originals[name]) for name, mine in _tensors(model).items()
                        if name.rpartition(".")[0] not in folds]
        self._changes, self._seen = Changes(net), (0, 0)

    def __call__(self, x: Tensor) -> Tensor:
        changes = self._changes()
        if changes != self._seen:
            self._follow()
            self._seen = changes
        logits: Tensor = self._model(x.to(self._dtype, memory_format=torch.channels_last))
        return logits.float()

    @torch.no_grad()
    def _follow(self) -> None:
        for mine, conv, norm in self._folds:
            weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean,
                                                norm.running_var, norm.eps, norm.weight, norm.bias)
            mine.weight.copy_(weight)
            mine.bias.copy_(bias)
        for copied, original in self._copies:
            copied.copy_(original)


def _view(net: nn.Module, sample: Tensor) -> nn.Module:
    """The fastest view that agrees with the network on the sample; else the network."""
    if any(p.dtype != torch.float32 for p in net.parameters()):
        return net
    with frozen(net), full_precision(), seeded(0, "fast"):
        try:
            wanted = look(net, sample)
            if not repeats(net, sample, wanted[0]):
                return net
        except Exception:  # no classifier: a memory of tensors
            return net
        for twin in (_twin(net, sample, wanted), None):
            try:
                logits, _ = look(Mixed(net, twin), sample)
            except Exception:  # the network insists on float32
                continue
            if close(logits, wanted[0], 0.1):
                return View(net, Mixed(net, twin))
    return net


def _twin(net: nn.Module, sample: Tensor, wanted: tuple[Tensor, Tensor]) -> Twin | None:
    """None where there is none: the same in float32 must agree, with its gradient."""
    try:
        logits, grad = look(Twin(net, sample, torch.float32), sample)
        agrees = close(logits, wanted[0], 1e-4) and close(grad, wanted[1], 1e-2)
        return Twin(net, sample) if agrees else None
    except Exception:  # control flow that fx cannot trace, modules that cannot be copied
        return None


@contextmanager
def _in_float32(linear: nn.Module | None) -> Iterator[None]:
    """The layer computes in float32 under autocast, too."""

    def again(layer: nn.Linear, features: tuple[Tensor], rounded: Tensor) -> Tensor:
        with torch.autocast(rounded.device.type, enabled=False):
            return F.linear(features[0].float(), layer.weight, layer.bias)

    hook = None if linear is None else linear.register_forward_hook(again)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names."""
    return {**dict(net.named_parameters(remove_duplicate=False)),
            **dict(net.named_buffers(remove_duplicate=False))}


def _in_eval(net: nn.Module) -> bool:
    return not any(module.training for module in net.modules())
