"""Local: the logits of images that differ from known ones in a small square, for less work.

A change of a few pixels changes the activations of a convolutional network in a window only,
which grows from layer to layer by the reach of the kernels. `Local` keeps the activations of the
known images and computes these windows alone, up to the layer where they cover so much of the
map that it pays no longer; the rest of the network, the tail, runs as it is.

A known image has a name and a version. A proposal that is taken over is the next version of its
image: the activations of one become those of the other by the windows that were computed for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import ShapeProp

from robench.attacks.windows import (
    LIMITS,
    PAYS,
    Move,
    Plan,
    margin_of,
    separate,
    shape_of,
    tail_work,
)

MEMORY = 2**28  # bytes that images and activations may take
# Kernels are built, and their memory is kept, for every size of a batch: above this number use
# its multiples only.
BATCHES = 16
_FILLED = 8  # images whose activations are computed at a time: copies of all would take memory


@dataclass(frozen=True, slots=True)
class Change:
    """How proposals differ from known images. All are (N,) int64.

    Attributes:
        key, version: the known image. Two images of one key and version are the same.
        after: the version that the proposal would be.
        top, left, size: outside of this square the two are equal: rows from `top`, columns from
            `left` on, inside of the image. Of size 0: no such square is known.
    """

    key: Tensor
    version: Tensor
    after: Tensor
    top: Tensor
    left: Tensor
    size: Tensor


Rows = Tensor | slice


class Proposals(Protocol):
    """The images of a `Change`, (M, C, H, W) for M of its rows, of the attack's type. Most are
    never asked for as a whole."""

    def images(self, rows: Rows) -> Tensor:
        """The proposals."""

    def known(self, rows: Rows) -> Tensor:
        """The known images that they differ from."""

    def squares(self, rows: Rows, size: int) -> Tensor:
        """(M, C, size, size): the squares of these proposals, which are all of that size."""


@dataclass(frozen=True, slots=True)
class _Look:
    """What the last call computed for the squares of one size: known, should they be taken.

    Attributes:
        row: of a proposal, by the place of its image in the cache and the version it would be.
        starts: of the windows. values: the windows.
    """

    row: dict[tuple[int, int], int]
    starts: Sequence[Tensor]
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
        self._slots: dict[int, int] = {}  # of the keys, in the tensors below
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

    def logits(self, change: Change, proposals: Proposals) -> Tensor:
        """Logits (N, K) of the proposals, in the network's type."""
        keys, versions, after, sizes = torch.stack(
            [change.key, change.version, change.after, change.size]).tolist()
        saves = {s for s, n in Counter(sizes).items() if self.saves(s, n)}
        looks, self._looks = self._looks, {}
        if not saves:
            return self._dense_logits(proposals.images(slice(None)))
        slots = self._take([(key, version) if s in saves else None
                            for key, version, s in zip(keys, versions, sizes, strict=True)])
        groups: dict[int, list[int]] = {}
        for row, (slot, s) in enumerate(zip(slots, sizes, strict=True)):
            groups.setdefault(0 if slot < 0 else s, []).append(row)
        parts: list[Tensor] = []
        for s, rows in groups.items():
            # Groups are of another size each time: the last row once more, to use few sizes.
            missing = -len(rows) % BATCHES if len(groups) > 1 and len(rows) > BATCHES else 0
            batch = rows + rows[-1:] * missing
            pick = slice(None) if len(groups) == 1 else torch.tensor(batch)
            plan = self._plan(s)
            if plan is None:
                logits = self._dense_logits(proposals.images(pick))
            else:
                places = [slots[row] for row in batch]
                # Popped: its memory is free for what comes.
                self._refresh(plan, batch, places, versions, proposals, looks.pop(s, None))
                logits = self._look(plan, places, [after[row] for row in batch],
                                    proposals.squares(pick, s), change.top[pick],
                                    change.left[pick])
            parts.append(logits[: len(rows)])
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

    def _take(self, names: Sequence[tuple[int, int] | None]) -> list[int]:
        """A place for each (key, version); -1 for None, for the second version of a key in the
        batch, and where no place is left."""
        wanted: dict[int, int] = {}
        for name in names:
            if name is not None:
                wanted.setdefault(*name)
        gone = iter([key for key in self._slots if key not in wanted])
        for key in wanted:
            if key not in self._slots and (slot := self._free(gone)) >= 0:
                self._slots[key] = slot
        return [self._slots.get(name[0], -1)
                if name is not None and wanted[name[0]] == name[1] else -1 for name in names]

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
        self, plan: Plan, rows: list[int], slots: list[int], versions: list[int],
        proposals: Proposals, last: _Look | None,
    ) -> None:
        """Make the places `slots` hold the maps of the known images of these rows."""
        stale: list[tuple[int, int]] = []  # (place, row)
        taken: list[tuple[int, int]] = []  # (place, row of the last call)
        holds: dict[int, int] = {}  # place -> version
        for row, slot in zip(rows, slots, strict=True):
            version, known = versions[row], self._sizes[slot] == plan.size
            if slot in holds or known and self._versions[slot] == version:
                continue
            before = last.row.get((slot, version)) if known and last is not None else None
            if before is None:
                stale.append((slot, row))
            else:
                taken.append((slot, before))
            holds[slot] = version
        for slot in holds:  # half of a map is none, should memory run out
            self._sizes[slot] = 0
        if last is not None and taken:
            self._commit(plan, taken, last)
        if stale:
            for some in torch.split(torch.tensor(stale), _FILLED):
                places, fresh = some.unbind(1)
                self._fill(plan, places, proposals.known(fresh))
        for slot, version in holds.items():
            self._sizes[slot], self._versions[slot] = plan.size, version

    def _commit(self, plan: Plan, taken: list[tuple[int, int]], last: _Look) -> None:
        """Take over squares of the last call: (place, row there)."""
        places, before = torch.tensor(taken).unbind(1)
        for node, move in plan.take.items():
            maps = self._map(node)
            start = last.starts[move.number][before] + places * math.prod(maps.shape[2:])
            move.put(maps, last.values[node][before], start)

    def _fill(self, plan: Plan, places: Tensor, base: Tensor) -> None:
        for node, values in zip(plan.kept, plan.fill(self._prepared(base)), strict=True):
            _inner(self._map(node), self._margins[node])[places] = values

    # The windows

    def _look(
        self, plan: Plan, slots: list[int], after: list[int], squares: Tensor, top: Tensor,
        left: Tensor,
    ) -> Tensor:
        """Logits of proposals whose known images are in these places; their squares."""
        starts = plan.starts(top, left, torch.tensor(slots))
        values = {self._image: self._prepared(squares)}

        def part(source: fx.Node, around: tuple[Move, Move] | None) -> Tensor:
            """The window, with what is known around it."""
            window = values[source]
            if around is None:
                return window
            cut, put = around
            made = cut.cut(self._map(source), starts)
            put.put(made, window, starts[put.number])
            return made

        for node, run, reads in plan.steps:
            values[node] = run([part(read.source, read.around) for read in reads])
        kept = {node: values[node] for node in plan.kept}
        row = {name: i for i, name in enumerate(zip(slots, after, strict=True))}
        self._looks[plan.size] = _Look(row, starts, kept)
        logits: Tensor = plan.tail(*(part(*frontier) for frontier in plan.whole.items()))
        return logits


def windows_of(maps: Tensor, height: int, width: int) -> Tensor:
    """(N, H', W', C, height, width), a view: the windows of (N, C, H, W) at all places."""
    return maps.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)


def _inner(maps: Tensor, margin: int) -> Tensor:
    h, w = maps.shape[2:]
    return maps[:, :, margin : h - margin, margin : w - margin]


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
