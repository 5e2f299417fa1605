"""Local: the logits of images that differ from known ones in a small square, for less work.

A change of a few pixels changes the activations of a convolutional network in a window only,
which grows from layer to layer by the reach of the kernels. `Local` keeps the activations of the
known images and computes these windows alone, up to the layer where they cover so much of the
map that it pays no longer; the rest of the network, the tail, runs as it is.

A known image has a name: whose it is, and how often it has been replaced by a proposal. The
activations of one image become those of the next by the windows that were computed for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import ShapeProp

from robench.attacks.windows import (
    LIMITS,
    PAYS,
    Place,
    Plan,
    Read,
    margin_of,
    separate,
    shape_of,
    tail_work,
)

MEMORY = 2**28  # bytes that images and activations may take


@dataclass(frozen=True, slots=True)
class _Look:
    """What the last call computed for the squares of one size: known, should they be taken.

    Attributes:
        row: of each unit's place in the cache.
        at: the places of the windows. values: the windows.
    """

    row: dict[int, int]
    at: list[Place]
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
        inputs = [node for node in model.graph.nodes if node.op == "placeholder"]
        self._image = inputs[0]
        self._fits = len(inputs) == 1 and separate(model)
        self._dense = tail_work(model, ())
        self._plans: dict[int, Plan | None] = {}
        self._looks: dict[int, _Look] = {}
        self._slots: dict[int, int] = {}  # of the units, in the tensors below
        self._sizes: list[int] = []  # of the squares for which a slot holds what is needed
        self._versions: list[int] = []  # of the image whose maps a slot holds
        self._maps: dict[fx.Node, Tensor] = {}
        self._margins = {node: margin_of(model, node) for node in model.graph.nodes}
        deep = self._plan(1)
        values = sum(math.prod(self._padded(node)) for node in deep.kept) if deep else 0
        size = max(1, values * sample.element_size())
        self._most = 1 << (MEMORY // size).bit_length() >> 1  # places come in powers of 2

    def saves(self, size: int, units: int) -> bool:
        """Whether squares of that size in that many images are worth the effort."""
        plan = self._plan(size)
        work = self._dense * units
        return plan is not None and plan.cost(units) <= PAYS * work

    def logits(
        self, keys: Tensor, version: Tensor, proposal: Tensor, base: Tensor, top: Tensor,
        left: Tensor, size: Tensor,
    ) -> Tensor:
        """Logits (N, K) of `proposal`, in the network's type.

        Args:
            keys: (N,) int64 names of the units.
            version: (N,) how many of its proposals a unit has taken over. Two images of one name
                and version are the same.
            proposal, base: (N, C, H, W) equal outside of the squares.
            top, left, size: (N,) the squares: rows from `top`, columns from `left` on, inside of
                the image. Of size 0: none is known.
        """
        names, versions, sizes = torch.stack([keys, version, size]).tolist()
        same = tuple(proposal.shape[1:]) == shape_of(self._image)[1:]
        saves = {s for s, n in Counter(sizes).items() if same and self.saves(s, n)}
        looks, self._looks = self._looks, {}
        if not saves:
            return self._dense_logits(proposal)
        slots = self._take([key if s in saves else None
                            for key, s in zip(names, sizes, strict=True)])
        groups: dict[int, list[int]] = {}
        for row, (slot, s) in enumerate(zip(slots, sizes, strict=True)):
            groups.setdefault(0 if slot < 0 else s, []).append(row)
        parts: list[Tensor] = []
        for s, rows in groups.items():
            pick = slice(None) if len(groups) == 1 else torch.tensor(rows)
            if s == 0:
                parts.append(self._dense_logits(proposal[pick]))
                continue
            plan = self._plan(s)
            assert plan is not None
            places = [slots[row] for row in rows]
            self._refresh(plan, places, [versions[row] for row in rows], base[pick], looks.get(s))
            parts.append(self._look(plan, places, proposal[pick], top[pick], left[pick]))
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([row for rows in groups.values() for row in rows])
        return torch.cat(parts)[order.argsort()]

    def _dense_logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self._model(self._prepared(x))
        return logits

    def _plan(self, size: int) -> Plan | None:
        """The cheapest plan for a batch of 32, or None."""
        if size not in self._plans:
            fits = self._fits and 0 < size <= min(shape_of(self._image)[2:])
            plans = [Plan(self._model, size, limit) for limit in LIMITS] if fits else []
            plans = [plan for plan in plans if len(plan.layers) > 1]
            self._plans[size] = min(plans, key=lambda plan: plan.cost(32), default=None)
        return self._plans[size]

    def _prepared(self, x: Tensor) -> Tensor:
        return x.to(self._dtype).contiguous(memory_format=torch.channels_last)

    # The units' places

    def _take(self, keys: Sequence[int | None]) -> list[int]:
        """A place for each key; -1 for None, for a key's second row, and where none is left."""
        wanted = set(keys)
        gone = iter([key for key in self._slots if key not in wanted])
        slots, seen = [], set[int]()
        for key in keys:
            slot = -1
            if key is not None and key not in seen:
                seen.add(key)
                slot = self._slots[key] if key in self._slots else self._free(gone)
                if slot >= 0:
                    self._slots[key] = slot
            slots.append(slot)
        return slots

    def _free(self, gone: Iterator[int]) -> int:
        """A new place, or that of a unit which is not in the batch."""
        if len(self._sizes) < self._most:
            self._sizes.append(0)
            self._versions.append(0)
            return len(self._sizes) - 1
        old = next(gone, None)
        if old is None:
            return -1
        slot = self._slots.pop(old)
        self._sizes[slot] = 0
        return slot

    def _map(self, node: fx.Node) -> Tensor:
        """(places, C, H, W) of a node with zeros around it."""
        maps = _grown(self._maps.get(node), len(self._sizes), self._padded(node), self._dtype)
        self._maps[node] = maps
        return maps

    def _padded(self, node: fx.Node) -> tuple[int, int, int]:
        _, c, h, w = shape_of(node)
        return c, h + 2 * self._margins[node], w + 2 * self._margins[node]

    # What is known

    def _refresh(
        self, plan: Plan, slots: list[int], versions: list[int], base: Tensor, last: _Look | None
    ) -> None:
        """Make the places hold the maps of `base`."""
        stale: list[int] = []
        taken: list[int] = []
        for row, (slot, version) in enumerate(zip(slots, versions, strict=True)):
            ahead = version - self._versions[slot]
            if self._sizes[slot] != plan.size or ahead not in (0, 1):
                stale.append(row)
            elif ahead:
                (taken if last is not None and slot in last.row else stale).append(row)
            self._versions[slot] = version
        if last is not None and taken:
            self._commit(plan, [slots[row] for row in taken], last)
        if stale:
            rows = slice(None) if len(stale) == len(slots) else torch.tensor(stale)
            self._fill(plan, [slots[row] for row in stale], base[rows])

    def _commit(self, plan: Plan, slots: list[int], last: _Look) -> None:
        """Take over the squares of the last call that these units accepted."""
        places, before = torch.tensor(slots), torch.tensor([last.row[slot] for slot in slots])
        for node in plan.kept:
            top, left = last.at[plan.place[node]]
            margin, values = self._margins[node], last.values[node][before]
            _put(self._map(node), values, places, top[before] + margin, left[before] + margin)

    def _fill(self, plan: Plan, slots: list[int], base: Tensor) -> None:
        places = torch.tensor(slots)
        for node, values in zip(plan.kept, plan.fill(self._prepared(base)), strict=True):
            _inner(self._map(node), self._margins[node])[places] = values
        for slot in slots:
            self._sizes[slot] = plan.size

    # The windows

    def _look(
        self, plan: Plan, slots: list[int], proposal: Tensor, top: Tensor, left: Tensor
    ) -> Tensor:
        """Logits of proposals whose known images are in these places."""
        at, rows, places = plan.places(top, left), torch.arange(len(slots)), torch.tensor(slots)
        pixels = _windows(proposal, plan.size, plan.size)[rows, top, left]
        values = {self._image: self._prepared(pixels)}

        def part(read: Read) -> Tensor:
            """The window, with what is known around it."""
            window = values[read.source]
            if read.size is None:
                return window
            around = _cut(self._map(read.source), *read.size, places, *at[read.cut])
            _put(around, window, rows, *at[read.put])
            return around

        def whole(node: fx.Node) -> Tensor:
            maps = _inner(self._map(node), self._margins[node])
            maps = (maps[: len(slots)].clone(memory_format=torch.channels_last)
                    if _in_order(slots) else maps[places])
            _put(maps, values[node], rows, *at[plan.place[node]])
            return maps

        for node, run, reads in plan.steps:
            values[node] = run([part(read) for read in reads])
        kept = {node: values[node] for node in plan.kept}
        place = {slot: row for row, slot in enumerate(slots)}
        self._looks[plan.size] = _Look(place, at, kept)
        logits: Tensor = plan.tail(*map(whole, plan.frontier))
        return logits


def _windows(maps: Tensor, height: int, width: int) -> Tensor:
    """(N, H', W', C, height, width), a view: the windows of (N, C, H, W) at all places."""
    return maps.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)


def _cut(
    maps: Tensor, height: int, width: int, rows: Tensor, top: Tensor, left: Tensor
) -> Tensor:
    """The windows (M, C, height, width) of the maps at `rows`, which are dense channels_last."""
    _, c, h, w = maps.shape
    lines = maps.as_strided((len(maps) * h * w - width + 1, width * c), (c, 1))
    first = torch.arange(height) * w
    lines = lines.index_select(0, (((rows * h + top) * w + left)[:, None] + first).flatten())
    return lines.view(len(rows), height, width, c).permute(0, 3, 1, 2)


def _put(maps: Tensor, values: Tensor, rows: Tensor, top: Tensor, left: Tensor) -> None:
    """Write windows (M, C, h, w) into the maps at `rows`."""
    _windows(maps, *values.shape[2:])[rows, top, left] = values


def _inner(maps: Tensor, margin: int) -> Tensor:
    h, w = maps.shape[2:]
    return maps[:, :, margin : h - margin, margin : w - margin]


def _in_order(slots: Sequence[int]) -> bool:
    return list(slots) == list(range(len(slots)))


def _grown(
    maps: Tensor | None, n: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The maps with at least n places."""
    if maps is not None and len(maps) >= n:
        return maps
    c, h, w = shape
    more = torch.zeros(1 << (n - 1).bit_length(), h, w, c, dtype=dtype).permute(0, 3, 1, 2)
    if maps is not None:
        more[: len(maps)] = maps
    return more
