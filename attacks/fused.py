"""Fused: convolutions with what follows them (an addition, a ReLU) as one kernel of oneDNN.

For networks on a CPU whose parameters are frozen: there are gradients for the images alone, and
weights in bfloat16 are kept in the layout that the kernel wants.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from robench.attacks.folding import loose

_ADD = {operator.add, operator.iadd, torch.add}
_RELU = {F.relu, torch.relu}
_BATCH = 32  # the weights' layout is chosen for such batches
_NARROW = 4  # inputs up to which the gradient of a convolution is computed in blocks


def fused(model: fx.GraphModule, sample: Tensor) -> fx.GraphModule:
    """The model itself, its convolutions replaced; unchanged where the kernels are missing.

    Args:
        model: frozen, in eval mode; in-place operations must not write what others read.
        sample: (N, C, H, W) images of the type that the network takes.
    """
    if not _available(sample):
        return model
    with torch.no_grad():
        ShapeProp(model).propagate(sample[:1])
    for node in list(model.graph.nodes):
        conv = _module(model, node, nn.Conv2d)
        if conv is None or not _fits(conv) or _calls(model, node) > 1:
            continue
        total, other = _added(node)
        relu = _followed(model, total)
        shape = node.args[0].meta["tensor_meta"].shape
        model.set_submodule(str(node.target), Fused(conv, shape[2:], relu is not None))
        chain = dict.fromkeys(part for part in (node, total, relu) if part is not None)
        _replace(model, list(chain), other)
    _share(model)
    model.recompile()
    model.delete_all_unused_submodules()
    return model


def forked(model: fx.GraphModule) -> fx.GraphModule:
    """A fused network for gradients, with the layers of the first.

    A convolution of one pixel and a stride (the shortcut of a residual block) reads a few pixels
    of its input, and its gradient there is added to what the input's other readers give: no map
    is filled with zeros, and none is added.
    """
    made = loose(fx.GraphModule(model, copy.deepcopy(model.graph)))
    nodes, layers = list(made.graph.nodes), _layers(made)
    for node, layer in layers.items():
        if len(node.args) > 1 or not _strided_pixel(layer):
            continue
        source = cast(fx.Node, node.args[0])
        readers = list(source.users)
        if len(readers) < 2 or not _own_gradients(layers, source):
            continue
        shape = source.meta["tensor_meta"].shape
        height, width = (-(-n // step) for n, step in zip(shape[2:], layer.stride, strict=True))
        made.set_submodule(str(node.target), layer.without_stride((height, width)))
        with made.graph.inserting_before(min(readers, key=nodes.index)):
            fork = made.graph.call_function(_fork, (source, layer.stride))
            whole, part = (made.graph.call_function(operator.getitem, (fork, i)) for i in (0, 1))
            whole.meta = dict(source.meta)
        for reader in readers:
            reader.replace_input_with(source, part if reader is node else whole)
    made.recompile()
    return made


class Fused(nn.Conv2d):
    """relu(conv(x) + other); the addition and the ReLU are optional.

    forward takes x (N, C, H, W) and other, of the shape of the output, or None.
    """

    def __init__(self, conv: nn.Conv2d, size: tuple[int, int], relu: bool) -> None:
        """size: of the usual images of this layer."""
        nn.Module.__init__(self)
        self.__dict__.update(vars(conv))
        self._parameters = dict(conv._parameters)
        self.relu = relu
        # What nobody else reads: `other`, `other` while no gradient is wanted, and the gradient
        # that comes back.
        self.spare = self.spare_unless_kept = self.spare_gradient = False
        assert not isinstance(conv.padding, str)
        self._around: tuple[int, ...] = conv.padding
        # In float32 the copies would cost more memory than they save time.
        self._packed = weight = conv.weight.detach()
        self._back: Tensor | None = None
        self._blocks = False
        packs = weight.dtype == torch.bfloat16
        if packs:
            self._packed = _packed(weight, self._how(self._around), (self.in_channels, *size))
        # Back through a convolution of stride 1 the way is a convolution, too.
        back = tuple(k - 1 - p for k, p in zip(conv.kernel_size, self._around, strict=True))
        narrow = self.in_channels <= _NARROW and not any(n % 2 for n in size)
        straight = set(self.stride) == {1} == set(self.dilation) and min(back) >= 0
        if not straight or not (packs or narrow):
            return
        turned = weight.flip(2, 3).transpose(0, 1)
        turned = _in_blocks(turned) if narrow else turned
        self._back = turned.contiguous(memory_format=torch.channels_last)
        self._blocks, stride = narrow, (2, 2) if narrow else (1, 1)
        self._back_how = back, stride, self.dilation, self.groups
        if packs:
            shape = (self.out_channels, *(n + k - 1 - 2 * b for n, k, b in zip(
                size, conv.kernel_size, back, strict=True)))
            self._back = _packed(self._back, self._back_how, shape)
        if not narrow:
            self.register_parameter("weight", None)  # nobody reads it any more

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or getattr(other, "requires_grad", False)):
            made: Tensor = _Differentiable.apply(self, x, other)
            return made
        return self.run(x, other, into=self.spare_unless_kept)

    def run(
        self, x: Tensor, other: Tensor | None, padding: tuple[int, ...] | None = None,
        *, into: bool = False,
    ) -> Tensor:
        """Without a gradient, with another padding if need be, and into `other` if allowed."""
        how, relu = self._how(padding or self._around), "relu" if self.relu else None
        call = torch.ops.mkldnn._convolution_pointwise
        if other is None:
            made: Tensor = call(x, self._packed, self.bias, *how, relu or "none", [], "")
        elif into:
            made = torch.ops.mkldnn._convolution_pointwise_.binary(
                other, x, self._packed, self.bias, *how, "add", None, relu, [], None)
        elif x.dtype == torch.bfloat16:
            made = call.binary(
                x, other, self._packed, self.bias, *how, "add", None, relu, [], None)
        else:  # in float32 the kernel's own addition is slower than two passes in place
            made = call(x, self._packed, self.bias, *how, "none", [], "").add_(other)
            if self.relu:
                made.relu_()
        return made

    def gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """Of the input, from that of the convolution's output."""
        fits = not (self._blocks and any(n % 2 for n in x.shape[2:]))
        if self._back is not None and fits:
            back: Tensor = torch.ops.mkldnn._convolution_pointwise(
                grad, self._back, None, *self._back_how, "none", [], "")
            return _from_blocks(back) if self._blocks else back
        made: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            grad, x, self.weight, None, self.stride, self.padding, self.dilation, False, [0, 0],
            self.groups, [True, False, False])
        return made[0]

    def without_stride(self, size: tuple[int, int]) -> Fused:
        """The same on the pixels that are read, an image of that size."""
        conv = nn.Conv2d(self.in_channels, self.out_channels, 1, device="meta")
        conv.weight, conv.bias = self.weight, self.bias
        return Fused(conv, size, self.relu)

    def _how(self, padding: tuple[int, ...]) -> tuple[Any, ...]:
        return padding, self.stride, self.dilation, self.groups


def _packed(weight: Tensor, how: tuple[Any, ...], shape: tuple[int, ...]) -> Tensor:
    """Weights as the kernel wants them for images of that shape (C, H, W)."""
    made: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *how, [_BATCH, *shape])
    return made


def _in_blocks(weight: Tensor) -> Tensor:
    """(4 C', C, k + 1, k + 1) of (C', C, k, k): what gives blocks of 2 x 2 outputs, to be
    shuffled into place, at stride 2. Kernels work on 16 outputs at a time: three colors alone
    would leave most of that idle."""
    shifted = [F.pad(weight, (b, 1 - b, a, 1 - a)) for a in (0, 1) for b in (0, 1)]
    return torch.stack(shifted, 1).flatten(0, 1)


def _from_blocks(blocks: Tensor) -> Tensor:
    """`pixel_shuffle` by 2 into an image that is contiguous, which is faster."""
    n, c, h, w = blocks.shape
    apart = blocks.permute(0, 2, 3, 1).reshape(n, h, w, c // 4, 2, 2)
    return apart.permute(0, 3, 1, 4, 2, 5).reshape(n, c // 4, 2 * h, 2 * w)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Fused, x: Tensor, other: Tensor | None) -> Tensor:
        y = layer.run(x, other, into=layer.spare)
        if y is other:
            ctx.mark_dirty(other)
        ctx.layer, ctx.adds = layer, other is not None
        ctx.save_for_backward(x, y if layer.relu else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor | None]:
        x, y = ctx.saved_tensors
        # Mixed layouts would be slow in all that follows.
        grad = grad.contiguous(memory_format=torch.channels_last)
        if y is not None:
            into = {"grad_input": grad} if ctx.layer.spare_gradient else {}
            grad = torch.ops.aten.threshold_backward(grad, y, 0, **into)
        return None, ctx.layer.gradient(grad, x), grad if ctx.adds else None


class _Fork(torch.autograd.Function):
    """A map (N, C, H, W), and every pixel of it that a stride meets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: tuple[int, int]) -> tuple[Tensor, Tensor]:
        ctx.stride = stride
        return x.view_as(x), _met(x, stride).contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, met: Tensor) -> tuple[Tensor, None]:
        _met(grad, ctx.stride).add_(met)  # a `Fused` layer made it, and nobody else reads it
        return grad, None


def _fork(x: Tensor, stride: tuple[int, int]) -> tuple[Tensor, Tensor]:
    made: tuple[Tensor, Tensor] = _Fork.apply(x, stride)
    return made


def _met(x: Tensor, stride: tuple[int, int]) -> Tensor:
    return x[:, :, :: stride[0], :: stride[1]]


def _available(sample: Tensor) -> bool:
    kinds = (torch.float32, torch.bfloat16)
    return (sample.device.type == "cpu" and sample.dtype in kinds
            and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
            and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
            and (sample.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def _fits(conv: nn.Conv2d) -> bool:
    return (conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
            and conv.groups == 1)


def _added(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """(the addition of another map of the same shape that alone uses the node, that map)."""
    user = _only_user(node)
    if user is None or user.op != "call_function" or user.target not in _ADD or user.kwargs:
        return node, None
    others = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
    shapes = [a.meta["tensor_meta"].shape for a in (node, *others) if "tensor_meta" in a.meta]
    if len(user.args) != 2 or len(others) != 1 or len(set(shapes)) != 1 or len(shapes) != 2:
        return node, None
    return user, others[0]


def _followed(model: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The ReLU that alone uses the node."""
    user = _only_user(node)
    if user is None:
        return None
    called = user.op == "call_function" and user.target in _RELU
    return user if called or _module(model, user, nn.ReLU) is not None else None


def _share(model: fx.GraphModule) -> None:
    """Let layers write into what nobody reads afterwards."""
    nodes, layers = list(model.graph.nodes), _layers(model)
    for node, layer in layers.items():
        layer.spare_gradient = _own_gradients(layers, node)
        if len(node.args) < 2:
            continue
        x, other = cast(Sequence[fx.Node], node.args)
        readers = list(other.users)
        if x is other or not layers.keys() >= {x, other, *readers}:
            continue  # something may be a view of it
        layer.spare_unless_kept = max(readers, key=nodes.index) is node
        layer.spare = readers == [node] and not layers[other].relu  # which would keep it


def _layers(model: fx.GraphModule) -> dict[fx.Node, Fused]:
    found = ((node, _module(model, node, Fused)) for node in model.graph.nodes)
    return {node: layer for node, layer in found if layer is not None}


def _own_gradients(layers: dict[fx.Node, Fused], node: fx.Node) -> bool:
    """Each reader of that map makes a gradient of its own; an addition alone hands its on."""
    return all(reader in layers and (layers[reader].relu or node not in reader.args[1:])
               for reader in node.users)


def _strided_pixel(conv: nn.Conv2d) -> bool:
    return set(conv.kernel_size) == {1} and max(conv.stride) > 1 and conv.padding == (0, 0)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _module(model: fx.GraphModule, node: fx.Node, kind: type[nn.Module]) -> Any:
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if type(module) is kind else None


def _calls(model: fx.GraphModule, node: fx.Node) -> int:
    return sum(1 for n in model.graph.nodes if n.op == "call_module" and n.target == node.target)


def _replace(model: fx.GraphModule, chain: Sequence[fx.Node], other: fx.Node | None) -> None:
    """One call in the place of the last of those that it replaces; the first is the convolution."""
    conv, last = chain[0], chain[-1]
    with model.graph.inserting_before(last):
        arguments = (conv.args[0],) if other is None else (conv.args[0], other)
        made = model.graph.call_module(str(conv.target), arguments)
        made.meta = dict(last.meta)
    last.replace_all_uses_with(made)
    for node in reversed(chain):
        model.graph.erase_node(node)
