"""Which layers of a network can be computed in windows only, and what that saves."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from robench.attacks.folding import loose
from robench.attacks.fused import Fused
from robench.attacks.spans import Span, Window

# Used where the estimated work is at most this share of the whole network's. Work is counted in
# float32 multiplications: those of the layers, and what it costs to move a value and, per batch
# and thread, to cut a window out, with all that goes with it. Measured on an AMD EPYC.
PAYS = 0.9
_MOVED, _CALLED = 40, 15_000_000
LIMITS = (0.2, 0.35, 0.5, 0.65, 0.8)  # shares of the map among which a plan has the choice

_FUNCTIONS = {
    F.relu, F.relu6, F.leaky_relu, F.silu, F.gelu, F.hardswish, torch.relu, torch.tanh,
    torch.sigmoid, torch.add, torch.sub, torch.mul, torch.div,
    operator.add, operator.iadd, operator.sub, operator.mul, operator.truediv,
}
_MODULES = {
    nn.BatchNorm2d, nn.Dropout, nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU,
    nn.GELU, nn.Hardswish, nn.Sigmoid, nn.Softplus, nn.Tanh,
}


# The plan for one size of squares


@dataclass(frozen=True, slots=True)
class Layer:
    """An operation that is computed in a window alone.

    Attributes:
        window: where its output changes.
        reads: its inputs, and which part of them it needs.
        run: from these parts to the output's window.
    """

    window: Window
    reads: tuple[tuple[fx.Node, Window], ...]
    run: Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class Move:
    """The way of windows out of maps, or into them. Maps are dense channels_last.

    Attributes:
        number: of the windows' first pixels among `Plan.starts`.
        height, width: of the windows. down: (height,) pixels from the first line to each line.
    """

    number: int
    height: int
    width: int
    down: Tensor

    def cut(self, maps: Tensor, starts: Sequence[Tensor]) -> Tensor:
        """(M, C, height, width) out of the maps."""
        rows = self._rows(starts[self.number])
        lines = self._lines(maps).index_select(0, rows)
        return lines.view(-1, self.height, self.width, maps.shape[1]).permute(0, 3, 1, 2)

    def put(self, maps: Tensor, values: Tensor, start: Tensor) -> None:
        """Write (M, C, height, width) into the maps, at pixels (M,)."""
        lines = values.permute(0, 2, 3, 1).reshape(-1, self.width * maps.shape[1])
        self._lines(maps).index_copy_(0, self._rows(start), lines)

    def _rows(self, start: Tensor) -> Tensor:
        return (start[:, None] + self.down).flatten()

    def _lines(self, maps: Tensor) -> Tensor:
        """A view: what `width` pixels hold, from each pixel on."""
        n, c, h, w = maps.shape
        return maps.as_strided((n * h * w - self.width + 1, self.width * c), (c, 1))


@dataclass(frozen=True, slots=True)
class Read:
    """An input of a layer: the new window itself, or with what is known around it.

    Attributes:
        around: None: the window alone. Else the way of the part out of the known map, and that of
            the window into the part.
    """

    source: fx.Node
    around: tuple[Move, Move] | None = None


class Plan:
    """How a change of a square of `size` pixels runs through a network.

    Attributes:
        layers: the local ones, in order; the first is the image itself.
        frontier: those whose whole maps the tail reads.
        kept: those whose whole maps must be known.
        steps: (layer, its function, its inputs), in order.
        whole: of each layer of the frontier its whole map out of the known one, and the window
            into that. take: the way of the windows of `kept` into the known maps; their starts
            are those in the first map.
        fill: the network from images to the maps of `kept`. tail: from `frontier` to logits.
        work: what an image costs; calls: operations on windows in a batch.
    """

    def __init__(self, model: fx.GraphModule, size: int, limit: float) -> None:
        """limit: share of its map above which a window is computed in the tail."""
        self.size, self._model = size, model
        self.layers: dict[fx.Node, Layer] = {}
        for node in model.graph.nodes:
            layer = _layer(model, node, self.layers, size)
            if layer is not None and _area(layer.window) <= limit * math.prod(shape_of(node)[2:]):
                self.layers[node] = layer
        self.frontier = [node for node in self.layers
                         if any(user not in self.layers for user in node.users)]
        beyond = {source for layer in self.layers.values() for source, window in layer.reads
                  if window != self.layers[source].window}
        self.kept = [node for node in self.layers if node in beyond or node in self.frontier]
        self._starts: list[tuple[list[int], list[int], int, int]] = []
        self.steps = [(node, layer.run, [self._read(*read) for read in layer.reads])
                      for node, layer in self.layers.items() if layer.reads]
        self.whole = {node: self._whole(node) for node in self.frontier}
        self.take = {node: self._move(_shifted(self.layers[node].window, self._margin(node)),
                                      self._padded(node)) for node in self.kept}
        self.work = tail_work(model, self.layers) + sum(
            math.prod(shape_of(node)) * 2 * _MOVED for node in self.frontier)
        self.calls = 0
        for node, layer in self.layers.items():
            self.work += _area(layer.window) * shape_of(node)[1] * (_work(model, node) + _MOVED)
            for source, window in layer.reads:
                if window != self.layers[source].window:
                    self.work += 2 * _MOVED * _area(window) * shape_of(source)[1]
                    self.calls += 1

    @cached_property
    def fill(self) -> fx.GraphModule:
        return _head(self._model, self.kept)

    @cached_property
    def tail(self) -> fx.GraphModule:
        return _tail(self._model, self.layers, self.frontier)

    def cost(self, units: int) -> int:
        """Work for a batch of that many units."""
        return units * self.work + self.calls * _CALLED * torch.get_num_threads()

    def starts(self, top: Tensor, left: Tensor, places: Tensor) -> Sequence[Tensor]:
        """The first pixels (M,) of all windows, for squares at (M,) whose known maps are in these
        places."""
        rows, columns, place, row = self._tables
        starts = rows.index_select(1, top) + columns.index_select(1, left)
        starts += place[:, None] * places
        starts += row[:, None] * torch.arange(len(top))
        return starts.unbind()

    @cached_property
    def _tables(self) -> tuple[Tensor, ...]:
        return tuple(torch.tensor(numbers) for numbers in zip(*self._starts, strict=True))

    def _read(self, source: fx.Node, window: Window) -> Read:
        own = self.layers[source].window
        if window == own:
            return Read(source)
        return Read(source, self._around(source, window))

    def _whole(self, node: fx.Node) -> tuple[Move, Move]:
        rows, columns = (Span((0,) * len(span.start), length) for span, length in zip(
            self.layers[node].window, shape_of(node)[2:], strict=True))
        return self._around(node, (rows, columns))

    def _around(self, source: fx.Node, window: Window) -> tuple[Move, Move]:
        """(a part out of the known map, the source's own window into that part)."""
        rows, columns = (Span(tuple(b - a for a, b in zip(outer.start, inner.start, strict=True)),
                              inner.size)
                         for outer, inner in zip(window, self.layers[source].window, strict=True))
        height, width = self._padded(source)
        part = window[0].size, window[1].size
        return (self._move(_shifted(window, self._margin(source)), (height, width),
                           place=height * width),
                self._move((rows, columns), part, row=part[0] * part[1]))

    def _move(self, window: Window, size: tuple[int, int], place: int = 0, row: int = 0) -> Move:
        """Of windows in maps of this size; so many pixels lie between two places or rows."""
        rows, columns = window
        width = size[1]
        self._starts.append(([a * width for a in rows.start], list(columns.start), place, row))
        return Move(len(self._starts) - 1, rows.size, columns.size,
                    torch.arange(rows.size) * width)

    def _margin(self, node: fx.Node) -> int:
        return margin_of(self._model, node)

    def _padded(self, node: fx.Node) -> tuple[int, int]:
        h, w = shape_of(node)[2:]
        return h + 2 * self._margin(node), w + 2 * self._margin(node)


def _shifted(window: Window, by: int) -> Window:
    rows, columns = (Span(tuple(a + by for a in span.start), span.size) for span in window)
    return rows, columns


def _layer(
    model: fx.GraphModule, node: fx.Node, layers: dict[fx.Node, Layer], size: int
) -> Layer | None:
    """None: the tail must do it."""
    if node.op == "placeholder":
        square = [Span(tuple(range(n - size + 1)), size) for n in shape_of(node)[2:]]
        return Layer((square[0], square[1]), (), lambda parts: parts[0])
    sources = [source for source in node.all_input_nodes if source in layers]
    if not sources or len(shape_of(node)) != 4:
        return None
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.Conv2d) and type(module) in (nn.Conv2d, Fused):
        return _convolution(module, node, layers)
    if not _pointwise(model, node, layers):
        return None
    spans = zip(*(layers[source].window for source in sources), strict=True)
    rows, columns = (Span.hull(parts, length)
                     for parts, length in zip(spans, shape_of(node)[2:], strict=True))
    run = _calls(model, node, sources)
    return Layer((rows, columns), tuple((s, (rows, columns)) for s in sources), run)


def _convolution(
    conv: nn.Conv2d, node: fx.Node, layers: dict[fx.Node, Layer]
) -> Layer | None:
    """conv(x), or with an addend: its window then covers the addend's, too."""
    source, *others = (value for value in node.args if isinstance(value, fx.Node))
    if (conv.padding_mode != "zeros" or isinstance(conv.padding, str)
            or any(value not in layers for value in (source, *others))):
        return None
    lengths = shape_of(node)[2:]
    reached = [span.reached(conv, axis, lengths[axis])
               for axis, span in enumerate(layers[source].window)]
    rows, columns = (
        Span.hull([span, *(layers[other].window[axis] for other in others)], lengths[axis])
        for axis, span in enumerate(reached))
    part = rows.read(conv, 0), columns.read(conv, 1)
    reads = ((source, part), *((other, (rows, columns)) for other in others))
    if isinstance(conv, Fused):
        fused = conv
        return Layer((rows, columns), reads, lambda parts: fused.run(
            parts[0], parts[1] if others else None, (0, 0)))
    weight, bias, stride, dilation = conv.weight, conv.bias, conv.stride, conv.dilation
    return Layer((rows, columns), reads, lambda parts: F.conv2d(
        parts[0], weight, bias, stride, 0, dilation, conv.groups))


def _pointwise(model: fx.GraphModule, node: fx.Node, layers: dict[fx.Node, Layer]) -> bool:
    """Whether each output depends on the inputs at its own place alone."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return type(module) in _MODULES and not module.training and getattr(
            module, "running_mean", module) is not None  # else it mixes the batch
    shape = shape_of(node)
    return node.op == "call_function" and node.target in _FUNCTIONS and not any(
        isinstance(value, fx.Node) for value in node.kwargs.values()
    ) and all(
        shape_of(value) == shape if value in layers else _per_channel(model, value)
        for value in node.args if isinstance(value, fx.Node))


def _per_channel(model: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "get_attr":
        return False
    value = operator.attrgetter(str(node.target))(model)
    return isinstance(value, Tensor) and all(
        n == 1 for n in (*value.shape[-2:], *value.shape[:-3]))


def _calls(
    model: fx.GraphModule, node: fx.Node, sources: Sequence[fx.Node]
) -> Callable[[list[Tensor]], Tensor]:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return lambda parts: module(parts[0])
    function: Any = node.target
    # Numbers of the parts, and constants.
    plan = [(sources.index(value), None) if value in sources else (None, (
        operator.attrgetter(str(value.target))(model) if isinstance(value, fx.Node) else value))
        for value in node.args]
    return lambda parts: function(
        *(value if i is None else parts[i] for i, value in plan), **node.kwargs)


def _head(model: fx.GraphModule, outputs: Sequence[fx.Node]) -> fx.GraphModule:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    kept = []
    for node in model.graph.nodes:
        if node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
        if node in outputs:  # a copy, since what follows may work in place
            kept.append(graph.call_method("clone", (copies[node],)))
    graph.output(tuple(kept))
    return _module(model, graph)


def _tail(
    model: fx.GraphModule, local: Iterable[fx.Node], frontier: Sequence[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in frontier}
    for node in model.graph.nodes:
        if node not in local:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return _module(model, graph)


def _module(model: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    module = fx.GraphModule(model, graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return loose(module)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Of the node's value for one image; () if it is no tensor."""
    meta = node.meta.get("tensor_meta")
    return tuple(getattr(meta, "shape", ()))


def _area(window: Window) -> int:
    return window[0].size * window[1].size


def _work(model: fx.GraphModule, node: fx.Node) -> int:
    """Multiplications per value."""
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.Conv2d):
        return module.in_channels // module.groups * math.prod(module.kernel_size)
    return module.in_features if isinstance(module, nn.Linear) else 0


def tail_work(model: fx.GraphModule, local: Iterable[fx.Node]) -> int:
    """Of the network without the layers that are computed locally."""
    return sum(math.prod(shape_of(node)) * (_work(model, node) + _MOVED)
               for node in model.graph.nodes
               if node not in local and node.op.startswith("call") and shape_of(node))


def separate(model: fx.GraphModule) -> bool:
    """No operation works in place on what another one reads, too."""
    for node in model.graph.nodes:
        in_place = node.target is operator.iadd or node.kwargs.get("inplace", False) or (
            node.op == "call_method" and str(node.target).endswith("_")) or (
            node.op == "call_module"
            and getattr(model.get_submodule(str(node.target)), "inplace", False)) or (
            node.target in _FUNCTIONS and any(value is True for value in node.args))
        if in_place and len(node.all_input_nodes[0].users) > 1:
            return False
    return True


# The cache


def margin_of(model: fx.GraphModule, node: fx.Node) -> int:
    """Zeros around a map, for what convolutions read."""
    modules = [model.get_submodule(str(user.target)) for user in node.users
               if user.op == "call_module"]
    return max((int(conv.padding[axis]) + conv.stride[axis] - 1
                for conv in modules if isinstance(conv, nn.Conv2d)
                if not isinstance(conv.padding, str) for axis in (0, 1)), default=0)
