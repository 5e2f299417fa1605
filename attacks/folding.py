"""The same network for less work: batch-norm folded into convolutions, bfloat16."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from robench.attacks.base import Classifier

Layer = TypeVar("Layer", bound=nn.Module)


def folded(model: nn.Module) -> tuple[fx.GraphModule, dict[str, str]]:
    """A traced copy of a network, in eval mode, each batch-norm folded into the convolution that
    it follows, and which these are: name of the convolution -> name of the batch-norm.

    Raises whatever torch.fx raises on control flow that it cannot trace.
    """
    traced = _traced(copy.deepcopy(model).eval())
    uses = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    folds: dict[str, str] = {}
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node):
            continue
        norm, conv = _called(traced, node, nn.BatchNorm2d), _called(traced, before, nn.Conv2d)
        if norm is None or conv is None or norm.running_var is None:
            continue
        if len(before.users) == uses[before.target] == uses[node.target] == 1:
            name = str(before.target)
            folds[name] = str(node.target)
            traced.set_submodule(name, fuse_conv_bn_eval(conv, norm))
            traced.delete_submodule(folds[name])
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.recompile()
    return traced, folds


def loose(model: fx.GraphModule) -> fx.GraphModule:
    """The network itself, which its graph no longer holds: it goes with its last user, not when
    the garbage collector comes."""
    model.graph.owning_module = None
    return model


def _traced(model: nn.Module) -> fx.GraphModule:
    tracer = fx.Tracer()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return loose(fx.GraphModule(model, tracer.trace(model)))
    finally:  # it holds itself, and with it all weights
        vars(tracer).clear()


class Float32Linear(nn.Linear):
    """A linear layer in float32 behind a network in bfloat16: bf16 logits would be too coarse."""

    def forward(self, features: Tensor) -> Tensor:  # (N, F) of any type -> (N, K)
        return F.linear(features.float(), self.weight, self.bias)


def in_bf16(net: nn.Module, sample: Tensor) -> nn.Module:
    """The network itself, frozen and converted, but for its last linear layer.

    sample: (N, C, H, W) images to try it on.
    """
    last = last_linear(net)
    exact = None if last is None else _in_float32(net.get_submodule(last))
    net = net.eval().requires_grad_(False).bfloat16()
    if last is not None and exact is not None:
        rounded = net.get_submodule(last)
        net.set_submodule(last, exact)
        try:
            with torch.no_grad():
                net(sample.bfloat16())
        except Exception:  # what follows that layer wants bfloat16
            net.set_submodule(last, rounded)
    return net


def _in_float32(linear: nn.Module) -> Float32Linear:
    assert isinstance(linear, nn.Linear)
    bias = linear.bias is not None
    made = Float32Linear(linear.in_features, linear.out_features, bias, linear.weight.device)
    made.load_state_dict(linear.state_dict())
    return made.requires_grad_(False)


def last_linear(net: nn.Module) -> str | None:
    """Name of the linear layer that was registered last; in a classifier it makes the logits."""
    return next((name for name, module in reversed(list(net.named_modules()))
                 if isinstance(module, nn.Linear)), None)


def look(net: Classifier, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the largest one. The gradient shows what logits hide."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = net(x)
        top = logits.amax(1).sum()
        grad = torch.autograd.grad(top, x, allow_unused=True)[0] if top.requires_grad else None
    return logits.detach(), torch.zeros_like(x) if grad is None else grad


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Equal up to rounding. A ReLU at its kink may flip, which a gradient shows: hence norms."""
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * b.norm())


def repeats(net: Classifier, x: Tensor, logits: Tensor) -> bool:
    """Whether the network gives these logits again, 8 times. Randomized networks do not."""
    with torch.no_grad():
        return all(close(net(x), logits, 1e-4) for _ in range(8))


def _called(traced: fx.GraphModule, node: fx.Node, kind: type[Layer]) -> Layer | None:
    """The layer that the node calls, if it is exactly of that kind."""
    layer = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
    return layer if type(layer) is kind else None
