"""Square Attack: random search that looks at logits alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from robench.attacks.base import ATTACKS
from robench.attacks.local import BATCHES, Change, Rows, windows_of
from robench.attacks.network import Network
from robench.attacks.noise import quick_uniform, words
from robench.attacks.objectives import cw_margin
from robench.attacks.pool import State, Step, Units, per_image
from robench.attacks.search import OneStage
from robench.attacks.threat import Norm, ThreatModel
from robench.errors import UsageError

# p is halved after these queries. AutoAttack does not stretch the schedule to their number.
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
ORDER = {"L2": 2, "L1": 1}
_TINY = 1e-12
# A unit looks one query further ahead for each so many in a row that changed nothing: if an
# improvement is as likely as that suggests, at most 1 look of 4 is in vain (measured: 1 of 23).
_PATIENCE = 2
_SPREAD = 64  # how many queries units may be apart: those that improve often go one by one


@ATTACKS.register(
    "square",
    description="random search that looks at logits alone, one square of pixels per query",
    paper="Andriushchenko et al. 2020, arXiv 1912.00049; L1: Croce and Hein 2021, arXiv 2103.01208",
)
@dataclass(frozen=True, slots=True)
class Square(OneStage):
    """Square Attack on the margin, as AutoAttack runs it.

    The first pass looks at the start, every other one at a random change of the best image so
    far, which takes its place if the margin grows. Linf: the start is vertical stripes, a change
    moves a square of pixels to x + eps or x - eps, one sign per channel. L2 and L1: the start is
    a grid of patterns with a positive and a negative half; a change empties one square window
    and lays such a pattern, with what that frees and what is left of eps, into another.

    Every unit draws squares of its own, and all places are equally likely. (AutoAttack shares
    each square among a batch, and its rounding never reaches the last row and column.)

    Most changes improve nothing, and the next query then starts from the same image. So where a
    batch has room, several queries of a unit are looked at in one pass; the first improvement
    counts, and what was looked at behind it is forgotten. The path is that of one by one.

    Attributes:
        queries: random changes per restart; there is one pass more.
        p_init: share of the pixels in the first squares; halved with the queries.
        restarts: independent runs; an image that has fallen is left alone.
    """

    threat: ThreatModel
    queries: int = 5000
    p_init: float = 0.8
    restarts: int = 1

    def __post_init__(self) -> None:
        for name, least in (("queries", 0), ("restarts", 1)):
            if not getattr(self, name) >= least:
                raise UsageError(f"{name} must be >= {least}, not {getattr(self, name)}")
        if not 0 < self.p_init <= 1:
            raise UsageError(f"p_init must be above 0 and at most 1, not {self.p_init}")

    @property
    def name(self) -> str:
        return "square"

    @property
    def steps(self) -> int:
        return self.queries + 1

    @property
    def unseen_end(self) -> bool:
        return False

    def units(self, classes: int) -> int:
        return self.restarts

    def size(self, query: int, height: int, width: int) -> int:
        """Side in pixels of the square of query number `query`, counted from 0."""
        p = self.p_init / 2 ** sum(query > q for q in HALVED_AFTER)
        side = round(math.sqrt(p * height * width))
        side = max(side, 1) if self.threat.norm == "Linf" else max(side, 3) // 2 * 2 + 1
        return min(side, height, width)

    def begin(self, units: Units) -> State:
        start = self._stripes(units) if self.threat.norm == "Linf" else self._grid(units)
        high, low = words(units.keys, 1, 2).unbind(1)
        return {"x_adv": start, "margin": torch.full_like(units.bar, -torch.inf),
                "seed": (high << 32) | low, "taken": torch.zeros_like(units.step)}

    def step(self, net: Network, units: Units) -> Step:
        # Without a graph, twice as many images take no more memory than others with one.
        state, room = units.state, 2 * net.batch // len(units)
        owner: Rows = slice(None)
        first: Rows = slice(None)
        query = last = units.step
        if room > 1:
            owner, query, last = self._ahead(units, room)
        images, logits = self._looks(net, units, owner, query)
        margin = cw_margin(logits, units.y[owner])
        if isinstance(owner, Tensor):
            # What is no number is no correct answer: the pool has to see it.
            ends = ~(margin <= state["margin"][owner])
            rows = torch.arange(len(query), device=query.device)
            first = last.scatter_reduce(0, owner, rows.where(ends, len(rows)), "amin")
            margin, query = margin[first], query[first]
        proposal, better = images(first), margin > state["margin"]
        # lerp with weights 0 and 1 copies exactly and is faster than where.
        accept = per_image(better).to(proposal.dtype)
        state["x_adv"] = torch.lerp(state["x_adv"], proposal, accept)
        state["taken"] = torch.where(better, query + 1, state["taken"])
        state["margin"] = torch.where(better, margin, state["margin"])
        return Step(proposal, margin, query + 1 - units.step)

    def _ahead(self, units: Units, room: int) -> tuple[Tensor, Tensor, Tensor]:
        """Up to `room` queries of each unit, one unit's after another's: (M,) whose they are,
        (M,) their numbers, (N,) the last one of each unit."""
        n, idle = len(units), units.step - units.state["taken"]
        most = (1 + idle // _PATIENCE).clamp_max(room).minimum(self.steps - units.step)
        # Nobody runs far ahead: squares of one size are looked at together (`Local`).
        some = most.minimum(units.step.min() + _SPREAD - units.step).clamp_min(1)
        slowest = units.step.argsort(stable=True)
        more = torch.cat([(some - 1)[slowest], (most - some)[slowest]]).cumsum(0)
        # Few sizes: if in doubt a larger one, or the slowest would be held back, and all would
        # wait for it.
        total, every = n + more[n - 1], n + more[-1]
        full = torch.where(total > BATCHES, (total + BATCHES - 1) // BATCHES * BATCHES, total)
        full = torch.where(full > every, (every // BATCHES * BATCHES).clamp_min(n), full)
        gained = more.minimum(full - n).diff(prepend=more.new_zeros(1))
        count = torch.ones_like(most)
        count[slowest] += gained[:n] + gained[n:]
        owner = torch.arange(len(count), device=count.device).repeat_interleave(count)
        end = count.cumsum(0)
        rows = torch.arange(len(owner), device=owner.device)
        return owner, (units.step - end + count)[owner] + rows, end - 1

    def _looks(
        self, net: Network, units: Units, owner: Rows, query: Tensor
    ) -> tuple[Callable[[Rows], Tensor], Tensor]:
        """The proposals of these queries (M,) of the units `owner`, and their logits."""
        state = units.state
        if self.threat.norm != "Linf":
            proposal = self._windows(units.take(owner) if isinstance(owner, Tensor) else units,
                                     query)
            return proposal.__getitem__, net.logits(proposal)
        seed = state["seed"][owner]
        squares = self._squares(units, owner, query, seed)
        change = Change(
            # Copies of an image with different labels go different ways.
            seed + units.y[owner], state["taken"][owner], query + 1, *squares.place)
        return squares.images, net.near(change, squares)

    # Linf

    def _stripes(self, units: Units) -> Tensor:
        _, c, _, w = units.x.shape
        return self._edge(units.x, _signs(units.noise(0).uniform(c, 1, w), units.x))

    def _squares(self, units: Units, owner: Rows, query: Tensor, seed: Tensor) -> _Squares:
        """The paper adds +-2 eps and projects: from anywhere in the ball that ends at its edge."""
        x = units.x
        _, c, h, w = x.shape
        draw = quick_uniform(seed, query, 2 + c)
        plan = _plan(self, h, w, x.dtype, x.device)
        places = plan.places(query, draw[:, :1], draw[:, 1:2])
        sign = _signs(draw[:, 2:, None, None], x)
        return _Squares(x, units.state["x_adv"], owner, query, places, sign, plan, self._edge)

    def _edge(self, x: Tensor, sign: Tensor) -> Tensor:
        edge = torch.add(x, sign, alpha=self.threat.eps)
        return edge.clamp_(self.threat.low, self.threat.high)

    # L2 and L1

    def _grid(self, units: Units) -> Tensor:
        x = units.x
        n, c, h, w = x.shape
        side = max(min(h, w) // 5, 1)
        down, across = h // side, w // side
        draw = units.noise(0).uniform(1 + c, down, 1, across, 1)
        tile = pattern(side, self.threat.norm).to(x)[:, None]
        tile = torch.where(draw[:, :1] < 0.5, tile, tile.permute(2, 1, 0))
        grid = (tile * _signs(draw[:, 1:], x)).reshape(n, c, down * side, across * side)
        top, left = (h - down * side) // 2, (w - across * side) // 2
        grid = F.pad(grid, (left, w - across * side - left, top, h - down * side - top))
        return self._inside(x, grid, self.threat.eps)

    def _windows(self, units: Units, query: Tensor) -> Tensor:
        """The best image with one window emptied and a pattern laid into another.

        Algorithm 3 of the paper; in L1 with AutoAttack's sums, which the projection cuts back.
        """
        x, norm = units.x, self.threat.norm
        _, c, h, w = x.shape
        draw = quick_uniform(units.state["seed"], query, 5 + c)
        plan = _plan(self, h, w, x.dtype, x.device)
        top, left, side = plan.places(query, draw[:, :2], draw[:, 2:4])
        squares = plan.windows(query, 0, (top, left, side))
        laid, emptied = squares[:, :1], squares[:, 1:]
        kind = 1 + (draw[:, 4:5] < 0.5).long()
        eta = plan.windows(query, kind, (top[:, :1], left[:, :1], side))

        delta = units.state["x_adv"] - x
        old, freed = delta * laid, delta * torch.maximum(laid, emptied)
        length = _whole(delta, norm)
        # The first step looks at the start: its windows are empty, and its length stays.
        wanted = torch.where(query[:, None, None, None] > 0, self.threat.eps, length)
        order = ORDER[norm]
        spare = (wanted**order - length**order).clamp_min(0) / c
        goal = (spare + _lengths(freed, norm) ** order) ** (1 / order)
        if norm == "L1":
            goal = goal * c
        sign = _signs(draw[:, 5:, None, None], x)
        # Up to the sign, which the last line puts back: the pattern needs no copy per channel.
        new = torch.addcmul(eta, old, sign / (_lengths(old, norm) + _TINY))
        delta -= freed
        delta.addcmul_(new, sign * goal / (_lengths(new, norm) + _TINY))
        return self._inside(x, delta, wanted)

    def _inside(self, x: Tensor, delta: Tensor, wanted: Tensor | float) -> Tensor:
        """In L2 delta is stretched to the wanted length, then cut by the box, as in the paper."""
        if self.threat.norm == "L1":
            return self.threat.project(x + delta, x)
        stretch = wanted / (_whole(delta, self.threat.norm) + _TINY)
        return torch.addcmul(x, delta, stretch).clamp_(self.threat.low, self.threat.high)


@dataclass(frozen=True, slots=True)
class _Squares:
    """Queries (M,): the best image of a unit with one square at the edge of the ball.

    Attributes:
        x, best: (N, C, H, W) of the units; owner: whose a query is, of all in turn: slice(None).
        places: (M, 1) top, left and side. sign: (M, C, 1, 1).
        edge: from images and signs to pixels at the edge.
    """

    x: Tensor
    best: Tensor
    owner: Rows
    query: Tensor
    places: tuple[Tensor, Tensor, Tensor]
    sign: Tensor
    plan: _Plan
    edge: Callable[[Tensor, Tensor], Tensor]

    @property
    def place(self) -> tuple[Tensor, ...]:
        return tuple(number[:, 0] for number in self.places)

    def images(self, rows: Rows) -> Tensor:
        top, left, side = self.places
        square = self.plan.windows(self.query[rows], 0, (top[rows], left[rows], side[rows]))
        edge = self.edge(self.x[self._of(rows)], self.sign[rows])
        return torch.lerp(self.known(rows), edge, square)

    def known(self, rows: Rows) -> Tensor:
        return self.best[self._of(rows)]

    def squares(self, rows: Rows, size: int) -> Tensor:
        top, left, _ = self.place
        owner = self._of(rows)
        if isinstance(owner, slice):
            owner = torch.arange(len(self.x))[owner]
        return self.edge(windows_of(self.x, size, size)[owner, top[rows], left[rows]],
                         self.sign[rows])

    def _of(self, rows: Rows) -> Rows:
        return rows if isinstance(self.owner, slice) else self.owner[rows]


def _signs(draw: Tensor, like: Tensor) -> Tensor:
    return 1 - 2 * (draw < 0.5).to(like.dtype)


def _lengths(delta: Tensor, norm: Norm) -> Tensor:
    """(N, C, 1, 1): the norm of each channel."""
    if norm == "L1":  # far faster than vector_norm on a CPU
        return delta.abs().sum((2, 3), keepdim=True)
    lengths: Tensor = torch.linalg.vector_norm(delta, dim=(2, 3), keepdim=True)
    return lengths


def _whole(delta: Tensor, norm: Norm) -> Tensor:
    """(N, 1, 1, 1): the norm of each image."""
    lengths = _lengths(delta, norm)
    whole: Tensor = torch.linalg.vector_norm(lengths, ORDER[norm], dim=1, keepdim=True)
    return whole


def pattern(side: int, norm: Norm) -> Tensor:
    """(side, side) float64: eta of section 3.3 of the paper, of norm 1, its lower half negative."""
    eta = torch.cat([_bump(side // 2, side, norm), -_bump(side - side // 2, side, norm)])
    return _scaled(eta, norm)


def _bump(height: int, width: int, norm: Norm) -> Tensor:
    """Nested rectangles around the middle; number k = 1, 2, ... adds k^-2, in L1 k^-4."""
    rows, columns = (torch.arange(n).sub(n // 2).abs() for n in (height, width))
    inner = torch.maximum(rows[:, None], columns)  # rectangles that do not reach a pixel
    k = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64)
    heights = (k ** (-4 / ORDER[norm])).flip(0).cumsum(0).flip(0)
    return _scaled(heights[inner], norm)


def _scaled(shape: Tensor, norm: Norm) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(shape, ORDER[norm])
    return shape / length


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is the same for all units.

    Attributes:
        level: (steps,) index of each step's size. At step 0, a look at the start, the size is 0.
        sides: (L,) the sizes in pixels.
        shapes: (L, K, H + 1, W + 1, H, W), a view: of each size the square of ones, the pattern
            and the pattern turned (Linf: the square alone); [..., H - r, W - c, :, :] has it
            with its corner at (r, c), zero elsewhere.
    """

    level: Tensor
    sides: Tensor
    shapes: Tensor

    def windows(
        self, step: Tensor, kind: Tensor | int, places: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """(N, M, H, W): shapes `kind` of the step's size at these places (N, M)."""
        h, w = self.shapes.shape[-2:]
        top, left, _ = places
        return self.shapes[self.level[step][:, None], kind, h - top, w - left]

    def places(self, step: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, M) first rows and columns, from uniform numbers (N, M), and (N, 1) sides."""
        h, w = self.shapes.shape[-2:]
        side = self.sides[self.level[step]][:, None]
        return (row * (h - side + 1)).long(), (column * (w - side + 1)).long(), side


@lru_cache(maxsize=8)
def _plan(attack: Square, h: int, w: int, dtype: torch.dtype, device: torch.device) -> _Plan:
    sizes = [0, *(attack.size(query, h, w) for query in range(attack.queries))]
    sides = sorted(set(sizes))
    level = torch.tensor([sides.index(size) for size in sizes], device=device)
    norm = attack.threat.norm
    canvas = torch.zeros(len(sides), 1 if norm == "Linf" else 3, 2 * h, 2 * w, dtype=dtype)
    for shapes, side in zip(canvas, sides, strict=True):
        corner = shapes[:, h : h + side, w : w + side]
        corner[0] = 1
        if norm != "Linf":
            corner[1] = pattern(side, norm)
            corner[2] = corner[1].mT
    view = canvas.to(device).unfold(2, h, 1).unfold(3, w, 1)
    return _Plan(level, torch.tensor(sides, device=device), view)
