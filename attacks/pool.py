"""The pool: continuous batching of an attack's units of work.

A unit is (image, restart or target). A `Stepper` advances a batch of units by one step; the pool
keeps that batch full: a unit that ends makes room for the next, and the other units of an image
that has fallen are dropped. A unit's path depends on its own rows alone, so that order and batch
size change nothing but rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from robench.attacks.memory import Batches
from robench.attacks.network import Network
from robench.attacks.noise import StreamNoise, stream_keys
from robench.attacks.threat import ThreatModel
from robench.signals import at_steps
from robench.signals import step as signal_step

State = dict[str, Tensor]  # every tensor has the leading dimension of the units


def per_image(values: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, 1), to go with images."""
    return values[:, None, None, None]


@dataclass(slots=True)
class Units:
    """N units in flight. Every tensor has a leading dimension N.

    Attributes:
        image: which image of the search.
        x, y: (N, C, H, W) the clean images, (N,) their labels.
        target: (N,) the class that a targeted unit pulls towards.
        number: (N,) which restart or target this is.
        step: (N,) steps taken so far.
        keys: (N, 4) the unit's random stream, see `noise`.
        bar: (N,) margin that a candidate must exceed to be claimed: 0, and after a claim that
            full precision did not confirm the margin of that claim.
        state: what the stepper keeps; state["x_adv"] (N, C, H, W) is the current iterate.
    """

    image: Tensor
    x: Tensor
    y: Tensor
    target: Tensor
    number: Tensor
    step: Tensor
    keys: Tensor
    bar: Tensor
    state: State

    def __len__(self) -> int:
        return len(self.image)

    def noise(self, draw: Tensor | int) -> StreamNoise:
        """The random numbers of draw `draw`, (N,) or one for all, from each unit's own stream."""
        return StreamNoise(self.keys, draw)

    def take(self, rows: Tensor) -> Units:
        """The units at `rows`, indices or a mask."""
        if rows.dtype == torch.bool:  # one look at the mask, not one for every tensor
            rows = rows.nonzero().flatten()
        return _map([self], lambda tensors: tensors[0][rows])

    @staticmethod
    def join(parts: Sequence[Units]) -> Units:
        return parts[0] if len(parts) == 1 else _map(parts, torch.cat)

    def copy(self) -> Units:
        return _map([self], lambda tensors: tensors[0].clone())


def _map(parts: Sequence[Units], function: Any) -> Units:
    names = [f.name for f in fields(Units) if f.name != "state"]
    state = {k: function([part.state[k] for part in parts]) for k in parts[0].state}
    return Units(**{n: function([getattr(part, n) for part in parts]) for n in names}, state=state)


@dataclass(slots=True)
class Step:
    """What one step looked at.

    Attributes:
        candidate: (N, C, H, W) an image of each unit whose logits were seen.
        margin: (N,) largest wrong logit minus true logit; positive where misclassified, -inf
            where the candidate must not count, for example because it is outside the ball.
        steps: (N,) steps that each unit is further now; 1 for all unless the stepper looks ahead.
    """

    candidate: Tensor
    margin: Tensor
    steps: Tensor | int = 1


class Stepper(Protocol):
    """One attack as a step on a batch of units: a frozen dataclass whose fields are its options.

    Rows are independent of each other: no operation mixes them, no reduction runs over them.
    """

    @property
    def name(self) -> str:
        """Of the stage, in records and in the random stream: "apgd-ce"."""

    @property
    def threat(self) -> ThreatModel: ...

    @property
    def steps(self) -> int:
        """Steps in a unit's life."""

    @property
    def unseen_end(self) -> bool:
        """Whether state["x_adv"] after the last step is still to be looked at."""

    def units(self, classes: int) -> int:
        """Restarts or targets per image, for a network with that many classes."""

    def rank(self, number: int) -> int:
        """Which wrong class unit `number` pulls towards: 0 is the runner-up on the clean image."""

    def begin(self, units: Units) -> State:
        """The state before the first step, without a pass through the network."""

    def step(self, net: Network, units: Units) -> Step:
        """Advance every unit by a step, or by as many as the result says: replaces tensors of
        units.state."""


@dataclass(frozen=True, slots=True)
class Images:
    """What is attacked, on the network's device.

    Attributes:
        x, y: (N, C, H, W) and (N,).
        ranked: (N, K - 1) the wrong classes by their clean logits, the largest first.
        ids: (N,) from `noise.image_ids`.
    """

    x: Tensor
    y: Tensor
    ranked: Tensor
    ids: Tensor


class Board(Protocol):
    """Where the pool learns which images stand and reports what became of the units."""

    @property
    def standing(self) -> Tensor:
        """(N,) bool, on the network's device."""

    def judge(self, image: Tensor, candidate: Tensor) -> Tensor:
        """Look at candidates (M, C, H, W) in full precision: (M,) bool. Confirmed ones fall."""

    def ended(self, image: Tensor, number: Tensor, last: Tensor) -> None:
        """Units that ended in vain; `last` (M, C, H, W) are their last iterates."""

    def tick(self, under_way: Callable[[], Units | None]) -> bool:
        """After every step, with a way to the units that have begun; False stops the pool."""


def new_units(
    stepper: Stepper, images: Images, chosen: Sequence[tuple[int, int]], seed: int
) -> Units:
    """The units (image, number) of a stepper, before their first step."""
    device = images.y.device
    image, number = torch.tensor(chosen, device=device).unbind(1)
    rank = torch.tensor([stepper.rank(n) for _, n in chosen], device=device)
    keys = torch.empty(len(chosen), 4, dtype=torch.int64, device=device)
    for n in {n for _, n in chosen}:
        mine = number == n
        keys[mine] = stream_keys(images.ids[image[mine]], seed, stepper.name, n)
    x = images.x[image]
    units = Units(
        image=image, x=x, y=images.y[image], target=images.ranked[image, rank],
        number=number, step=torch.zeros_like(number), keys=keys,
        bar=torch.zeros(len(x), dtype=x.dtype, device=device), state={},
    )
    units.state = stepper.begin(units)
    return units


@dataclass(slots=True)
class _Claim:
    """Candidates that wait for full precision, and the units that go on if it says no.

    end: (N,) bool: the candidate is the unit's last word.
    """

    units: Units
    candidate: Tensor
    margin: Tensor
    end: Tensor


class Pool:
    """Runs units of one stepper to their ends.

    Args:
        todo: (image, number) of each unit, in this order.
        slots: units in flight; halved, as often as it takes, where they do not fit into memory.
        seed: of the search; each stepper, restart and image has its own stream of it.
        waiting: units that were under way when an earlier pool stopped; not among todo.
    """

    def __init__(
        self, stepper: Stepper, net: Network, images: Images, board: Board,
        todo: Sequence[tuple[int, int]], *, slots: int, seed: int,
        waiting: Units | None = None,
    ) -> None:
        self._stepper, self._net, self._images, self._board = stepper, net, images, board
        self._batches, self._seed = Batches(slots), seed
        net.batch = slots  # of a stepper that has the choice
        self._queue = deque(todo)
        self._claims: list[_Claim] = []
        # go on after a claim that was not confirmed, or after an interruption
        self._waiting = [] if waiting is None else [waiting]
        self._claimed: set[int] = set()  # images of the claims
        self._flying: Units | None = None
        self._fallen = False  # since the units in flight were last looked through

    def run(self) -> bool:
        """True when every unit has ended, False when the board stopped it.

        A signal is handled after a step, when the board has had its tick.
        """
        with at_steps():
            return self._run()

    def _run(self) -> bool:
        while True:
            flying = self._flying = self._filled()
            if flying is None:
                if not self._claims:
                    return True
                self._confirm()
                continue
            step = self._advance(flying)
            if step is None:
                continue
            flying.step += step.steps
            # What is no number is no correct answer: full precision will tell.
            margin = step.margin.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
            claimed, done = margin > flying.bar, flying.step >= self._stepper.steps
            leaving = claimed | done
            if bool(leaving.any()):
                self._land(flying, step.candidate, margin, claimed, done)
                self._flying = flying.take(~leaving)
            if not self._board.tick(self.under_way):
                if self._claims:
                    self._confirm()
                return False
            signal_step()

    def _advance(self, flying: Units) -> Step | None:
        """A step of all units; None if they do not fit into memory, and fewer are to fly."""
        net, step = self._net, cast(Step | None, None)
        state, passes = dict(flying.state), (net.forwards, net.backwards)
        with self._batches.fitted():
            step = self._stepper.step(net, flying)
        if step is None:  # the step was not taken
            net.forwards, net.backwards = passes
            flying.state, self._flying = state, None
            self._waiting.append(flying)
            net.fits(self._batches.size)
        return step

    def under_way(self) -> Units | None:
        """Copies of the units that have begun and not ended, without those whose claim waits."""
        parts = [*self._waiting, *([] if self._flying is None else [self._flying])]
        parts = [part for part in parts if len(part)]
        return Units.join(parts).copy() if parts else None

    def _filled(self) -> Units | None:
        """The units in flight without those of fallen images, and new ones in their place."""
        flying, parts = self._flying, []
        if flying is not None and self._fallen:
            flying = flying.take(self._board.standing[flying.image])
        self._fallen = False
        if flying is not None and len(flying):
            parts = [flying]
        slots = self._batches.size
        room = slots - sum(map(len, parts))
        if room > 0 and self._claims and (
            sum(len(c.candidate) for c in self._claims) >= slots // 4
            or len(self._queue) < room
        ):
            self._flying = flying
            self._confirm()
            return self._filled()
        while room > 0 and self._waiting:
            units = self._waiting.pop()
            units = units.take(self._board.standing[units.image])
            if len(units) > room:
                rows = torch.arange(len(units), device=units.y.device)
                self._waiting.append(units.take(rows[room:]))
                units = units.take(rows[:room])
            parts.append(units)
            room -= len(units)
        fresh = self._next(room)
        if fresh:
            parts.append(new_units(self._stepper, self._images, fresh, self._seed))
        parts = [part for part in parts if len(part)]
        return Units.join(parts) if parts else None

    def _next(self, room: int) -> list[tuple[int, int]]:
        """Up to `room` units of images that stand and have no claim that waits."""
        if room <= 0 or not self._queue:
            return []
        standing = self._board.standing.tolist()
        fresh: list[tuple[int, int]] = []
        for _ in range(len(self._queue)):
            if len(fresh) == room:
                break
            unit = self._queue.popleft()
            if unit[0] in self._claimed:
                self._queue.append(unit)
            elif standing[unit[0]]:
                fresh.append(unit)
        return fresh

    def _land(
        self, flying: Units, candidate: Tensor, margin: Tensor, claimed: Tensor, done: Tensor
    ) -> None:
        """Take claims and ended units out of the flight."""
        rows = claimed.nonzero().flatten()
        if len(rows):
            self._claim(flying.take(rows), candidate[rows], margin[rows])
        rows = (done & ~claimed).nonzero().flatten()
        if len(rows):
            self._end(flying.take(rows))

    def _claim(self, units: Units, candidate: Tensor, margin: Tensor, end: bool = False) -> None:
        self._claims.append(_Claim(units, candidate, margin, torch.full_like(units.y, end).bool()))
        self._claimed.update(units.image.tolist())

    def _end(self, units: Units) -> None:
        """Units that took all their steps and claimed nothing in the last."""
        last = units.state["x_adv"]
        if self._stepper.unseen_end:
            self._claim(units, last, torch.zeros_like(units.bar), end=True)
        else:
            self._board.ended(units.image, units.number, last)

    def _confirm(self) -> None:
        claims, self._claims = self._claims, []
        self._claimed.clear()
        units = Units.join([claim.units for claim in claims])
        candidate, margin, end = (
            torch.cat([cast(Tensor, getattr(claim, name)) for claim in claims])
            for name in ("candidate", "margin", "end")
        )
        fell = self._board.judge(units.image, candidate)
        self._fallen = True
        over = end & ~fell
        if bool(over.any()):
            self._board.ended(units.image[over], units.number[over], candidate[over])
        on = ~end & ~fell
        units, units_margin = units.take(on), margin[on]
        units.bar = units_margin
        more = units.step < self._stepper.steps
        self._waiting.append(units.take(more))
        if bool((~more).any()):
            self._end(units.take(~more))
