"""Local: the logits of images that differ from known ones in a small square, for less work.

A change of a few pixels changes the activations of a convolutional network in a window only,
which grows from layer to layer by the reach of the kernels. `Local` keeps the activations of the
known images and computes these windows alone, up to the layer where they cover so much of the
map that it pays no longer; the rest of the network, the tail, runs as it is.

It is a cache: every known image that comes in is compared with the one that the activations
belong to, so that no caller can make it wrong.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

MEMORY = 2**28  # bytes that images and activations may take
# Used where the estimated work is at most this share of the whole network's. Work is counted in
# multiplications: those of the layers, and what moving a value and calling a layer cost.
PAYS = 0.8
_MOVED, _CALLED = 40, 1_500_000
_LIMITS = (0.2, 0.35, 0.5, 0.65, 0.8)  # shares of the map among which a plan has the choice

_FUNCTIONS = {
    F.relu, F.relu6, F.leaky_relu, F.silu, F.gelu, F.hardswish, torch.relu, torch.tanh,
    torch.sigmoid, torch.add, torch.sub, torch.mul, torch.div,
    operator.add, operator.iadd, operator.sub, operator.mul, operator.truediv,
}
_MODULES = {
    nn.BatchNorm2d, nn.Dropout, nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU,
    nn.GELU, nn.Hardswish, nn.Sigmoid, nn.Softplus, nn.Tanh,
}


# Where a change reaches


@dataclass(frozen=True, slots=True)
class Span:
    """An interval of rows (or columns) for every place 0, 1, ... of the square in the image.

    Attributes:
        start: its first row at each place. size: its length, the same everywhere.
    """

    start: tuple[int, ...]
    size: int

    @staticmethod
    def cover(low: Iterable[int], high: Iterable[int], length: int) -> Span:
        """Intervals of one size inside [0, length) that cover what of [low, high) is in there."""
        parts = [(max(a, 0), min(b, length)) for a, b in zip(low, high, strict=True)]
        size = max(1, max(b - a for a, b in parts))
        return Span(tuple(min(a, length - size) for a, _ in parts), size)

    @staticmethod
    def hull(spans: Sequence[Span], length: int) -> Span:
        low = [min(starts) for starts in zip(*(span.start for span in spans), strict=True)]
        stops = zip(*(span.stop for span in spans), strict=True)
        return Span.cover(low, [max(stop) for stop in stops], length)

    @property
    def stop(self) -> tuple[int, ...]:
        return tuple(start + self.size for start in self.start)

    def reached(self, conv: nn.Conv2d, axis: int, length: int) -> Span:
        """The outputs of a convolution, `length` in all, that read any of these inputs."""
        reach, stride, padding = _geometry(conv, axis)
        # The second number: what the first of these outputs read begins no later than these.
        low = (min(-((reach - a - padding) // stride), (a + padding) // stride)
               for a in self.start)
        high = ((b - 1 + padding) // stride + 1 for b in self.stop)
        return Span.cover(low, high, length)

    def read(self, conv: nn.Conv2d, axis: int) -> Span:
        """The inputs that these outputs of a convolution read, padding among them.

        And the stride - 1 behind them, which no output may read: all that changed is among them.
        """
        reach, stride, padding = _geometry(conv, axis)
        return Span(tuple(a * stride - padding for a in self.start), self.size * stride + reach)


Window = tuple[Span, Span]  # rows, columns


def _geometry(conv: nn.Conv2d, axis: int) -> tuple[int, int, int]:
    """(reach of the kernel, stride, padding)."""
    reach = (conv.kernel_size[axis] - 1) * conv.dilation[axis]
    return reach, conv.stride[axis], int(conv.padding[axis])


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


class Plan:
    """How a change of a square of `size` pixels runs through a network.

    Attributes:
        layers: the local ones, in order; the first is the image itself.
        frontier: those whose whole maps the tail reads.
        kept: those whose whole maps must be known.
        fill: the network from images to the maps of `kept`. tail: from `frontier` to logits.
        work: what an image costs; calls: operations on windows in a batch.
    """

    def __init__(self, model: fx.GraphModule, size: int, limit: float) -> None:
        """limit: share of its map above which a window is computed in the tail."""
        self.size = size
        self.layers: dict[fx.Node, Layer] = {}
        for node in model.graph.nodes:
            layer = _layer(model, node, self.layers, size)
            if layer is not None and _area(layer.window) <= limit * math.prod(_shape(node)[2:]):
                self.layers[node] = layer
        self.frontier = [node for node in self.layers
                         if any(user not in self.layers for user in node.users)]
        beyond = {source for layer in self.layers.values() for source, window in layer.reads
                  if window != self.layers[source].window}
        self.kept = [node for node in self.layers if node in beyond or node in self.frontier]
        self.fill, self.tail = _head(model, self.kept), _tail(model, self.layers, self.frontier)
        windows = dict.fromkeys(w for layer in self.layers.values()
                                for w in (layer.window, *(window for _, window in layer.reads)))
        self._rows, self._columns = (
            torch.tensor([window[axis].start for window in windows]) for axis in (0, 1))
        self._number = {window: i for i, window in enumerate(windows)}
        self.work = _tail_work(model, self.layers) + sum(
            math.prod(_shape(node)) * 2 * _MOVED for node in self.frontier)
        self.calls = 0
        for node, layer in self.layers.items():
            self.work += _area(layer.window) * _shape(node)[1] * (_work(model, node) + _MOVED)
            for source, window in layer.reads:
                if window != self.layers[source].window:
                    self.work += 2 * _MOVED * _area(window) * _shape(source)[1]
                    self.calls += 1

    def cost(self, units: int) -> int:
        """Work for a batch of that many units."""
        return units * self.work + self.calls * _CALLED * torch.get_num_threads()

    def places(self, top: Tensor, left: Tensor) -> Callable[[Window], tuple[Tensor, Tensor]]:
        """Where each window lies, first rows and first columns (N,), for squares at (N,)."""
        rows, columns = self._rows[:, top].unbind(), self._columns[:, left].unbind()
        return lambda window: (rows[self._number[window]], columns[self._number[window]])


def _layer(
    model: fx.GraphModule, node: fx.Node, layers: dict[fx.Node, Layer], size: int
) -> Layer | None:
    """None: the tail must do it."""
    if node.op == "placeholder":
        square = [Span(tuple(range(n - size + 1)), size) for n in _shape(node)[2:]]
        return Layer((square[0], square[1]), (), lambda parts: parts[0])
    sources = [source for source in node.all_input_nodes if source in layers]
    if not sources or len(_shape(node)) != 4:
        return None
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    if type(module) is nn.Conv2d and module.padding_mode == "zeros":
        return None if isinstance(module.padding, str) else _convolution(
            module, sources[0], layers[sources[0]].window, _shape(node))
    if not _pointwise(model, node, layers):
        return None
    spans = zip(*(layers[source].window for source in sources), strict=True)
    rows, columns = (Span.hull(parts, length)
                     for parts, length in zip(spans, _shape(node)[2:], strict=True))
    run = _calls(model, node, sources)
    return Layer((rows, columns), tuple((s, (rows, columns)) for s in sources), run)


def _convolution(
    conv: nn.Conv2d, source: fx.Node, changed: Window, shape: Sequence[int]
) -> Layer:
    rows, columns = (span.reached(conv, i, shape[2 + i]) for i, span in enumerate(changed))
    part = rows.read(conv, 0), columns.read(conv, 1)
    weight, bias, stride, dilation = conv.weight, conv.bias, conv.stride, conv.dilation
    return Layer((rows, columns), ((source, part),), lambda parts: F.conv2d(
        parts[0], weight, bias, stride, 0, dilation, conv.groups))


def _pointwise(model: fx.GraphModule, node: fx.Node, layers: dict[fx.Node, Layer]) -> bool:
    """Whether each output depends on the inputs at its own place alone."""
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))) in _MODULES
    shape = _shape(node)
    return node.op == "call_function" and node.target in _FUNCTIONS and not any(
        isinstance(value, fx.Node) for value in node.kwargs.values()
    ) and all(
        _shape(value) == shape if value in layers else _per_channel(model, value)
        for value in node.args if isinstance(value, fx.Node))


def _per_channel(model: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "get_attr":
        return False
    shape = operator.attrgetter(str(node.target))(model).shape
    return all(n == 1 for n in (*shape[-2:], *shape[:-3]))


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
    graph.eliminate_dead_code()
    return fx.GraphModule(model, graph)


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Of the node's value for one image; () if it is no tensor."""
    meta = node.meta.get("tensor_meta")
    return tuple(getattr(meta, "shape", ()))


def _area(window: Window) -> int:
    return window[0].size * window[1].size


def _work(model: fx.GraphModule, node: fx.Node) -> int:
    """Multiplications per value."""
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    weight = getattr(module, "weight", None)
    return weight[0].numel() if isinstance(module, nn.Conv2d | nn.Linear) else 0 * bool(weight is 0)


def _tail_work(model: fx.GraphModule, local: Iterable[fx.Node]) -> int:
    """Of the network without the layers that are computed locally."""
    return sum(math.prod(_shape(node)) * (_work(model, node) + _MOVED)
               for node in model.graph.nodes
               if node not in local and node.op.startswith("call") and _shape(node))


def _separate(model: fx.GraphModule) -> bool:
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


@dataclass(frozen=True, slots=True)
class _Look:
    """What the last call computed for the squares of one size: known, should they be taken.

    Attributes:
        row: of each unit's place in the cache.
        at: the places of the windows. pixels, values: the squares and the windows.
    """

    row: dict[int, int]
    at: Callable[[Window], tuple[Tensor, Tensor]]
    pixels: Tensor
    values: dict[fx.Node, Tensor]


class Local:
    """Logits of a network for images that differ from known ones in small squares.

    Only on a CPU, as it waits for values. Use it without gradients.
    """

    def __init__(self, model: fx.GraphModule, sample: Tensor) -> None:
        """sample: (N, C, H, W) an image of the size and the type that the network takes."""
        self._model, self._dtype = model, sample.dtype
        with torch.no_grad():
            ShapeProp(model).propagate(sample[:1])
        self._image = next(iter(model.graph.nodes))
        self._fits = _separate(model) and sum(n.op == "placeholder" for n in model.graph.nodes) == 1
        self._dense = _tail_work(model, ())
        self._plans: dict[int, Plan | None] = {}
        self._looks: dict[int, _Look] = {}
        self._slots: dict[int, int] = {}  # of the units, in the tensors below
        self._sizes: list[int] = []  # of the squares for which a slot holds what is needed
        self._images = torch.empty(0)
        self._maps: dict[fx.Node, Tensor] = {}
        self._margins = {node: _margin(model, node) for node in model.graph.nodes}
        deep = self._plan(1)
        values = sum(self._padded(node).numel() for node in deep.kept) if deep else 0
        size = values * sample.element_size() + 8 * sample[0].numel()
        self._most = MEMORY // size

    def saves(self, size: int, units: int) -> bool:
        """Whether squares of that size in that many images are worth the effort."""
        plan = self._plan(size)
        return plan is not None and plan.cost(units) <= PAYS * self._dense * units

    def logits(
        self, keys: Tensor, base: Tensor, proposal: Tensor, top: Tensor, left: Tensor,
        size: Tensor,
    ) -> Tensor:
        """Logits (N, K) of `proposal`, in the network's type.

        Args:
            keys: (N,) int64 names of the units.
            base, proposal: (N, C, H, W) equal outside of the squares.
            top, left, size: (N,) the squares: rows from `top`, columns from `left` on, inside of
                the image. Of size 0: none is known.
        """
        groups: dict[int, list[int]] = {}
        names, sizes = keys.tolist(), size.tolist()
        saves = {s for s, n in Counter(sizes).items() if self.saves(s, n)}
        slots = self._take([key if s in saves else None
                            for key, s in zip(names, sizes, strict=True)], base)
        for row, (slot, s) in enumerate(zip(slots, sizes, strict=True)):
            groups.setdefault(0 if slot < 0 else s, []).append(row)
        looks, self._looks = self._looks, {}
        parts = []
        for s, rows in groups.items():
            pick = slice(None) if len(groups) == 1 else torch.tensor(rows)
            if s == 0:
                parts.append(self._model(self._prepared(proposal[pick])))
                continue
            plan = self._plans[s]
            assert plan is not None
            places = [slots[row] for row in rows]
            self._refresh(plan, places, base[pick], looks.get(s))
            parts.append(self._look(plan, places, proposal[pick], top[pick], left[pick]))
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([row for rows in groups.values() for row in rows])
        return torch.cat(parts)[order.argsort()]

    def _plan(self, size: int) -> Plan | None:
        """The cheapest plan for a batch of 32, or None."""
        if size not in self._plans:
            fits = self._fits and 0 < size <= min(_shape(self._image)[2:])
            plans = [Plan(self._model, size, limit) for limit in _LIMITS] if fits else []
            plans = [plan for plan in plans if len(plan.layers) > 1]
            self._plans[size] = min(plans, key=lambda plan: plan.cost(32), default=None)
        return self._plans[size]

    def _prepared(self, x: Tensor) -> Tensor:
        return x.to(self._dtype).contiguous(memory_format=torch.channels_last)

    # The units' places

    def _take(self, keys: Sequence[int | None], base: Tensor) -> list[int]:
        """A place for each key; -1 for None, for a key's second row, and where none is left."""
        wanted, slots = set(keys), []
        for key in keys:
            slot = -1
            if key is not None and key in wanted:
                wanted_still = self._slots.get(key)
                slot = wanted_still if wanted_still is not None else self._free(key, keys, base)
                wanted.discard(key)
            slots.append(slot)
        return slots
