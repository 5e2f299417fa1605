"""The run as a graph: trainings, attacks on shards of the images, and what waits for what."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Literal, NamedTuple, Protocol

from robench.attacks.search import Pooled
from robench.attacks.threat import ThreatModel
from robench.benchmark.cells import Cell
from robench.benchmark.parts import BATCH, slices
from robench.benchmark.spec import AttackSpec, RunSpec, check_attacks, threat_models

CURVE = AttackSpec(name="pgd-20", limit=1000)  # for the figure of accuracy over eps
CURVE_FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
UNRANKED = AttackSpec(name="pgd-20")

Kind = Literal["train", "shard", "attack", "transfer"]
Role = Literal["table", "curve"]
Pair = tuple[AttackSpec, ThreatModel, Role]
Span = tuple[int, int]  # of test images: start, stop


class Estimate(NamedTuple):
    """How long something takes, in seconds, and why one thinks so; None: nobody knows."""

    seconds: float | None = None
    basis: str = ""
    memory: int | None = None  # bytes at the peak


@dataclass(frozen=True)
class Task:
    """A piece of work that leaves one file, named by all that its content depends on.

    Attributes:
        key: its name in the graph. needs: keys of the tasks that must have been done.
        run: which of the requests that are run together, from 0.
        owner: key of the cell, or the source of a network from outside.
        checkpoint: of the cell. pair: which attack, a place in `pairs`.
        span: of a shard, [start, stop) of the test images.
        threads: of torch. gpu: share of one.
        estimate: of its time and memory. done: its file is there.
    """

    key: str
    kind: Kind
    label: str
    needs: tuple[str, ...] = ()
    run: int = 0
    owner: str = ""
    checkpoint: str = ""
    pair: int = 0
    span: Span | None = None
    threads: int = 1
    gpu: float = 0.0
    estimate: Estimate = Estimate()
    done: bool = False


class Known(Protocol):
    """What earlier runs have left."""

    def trained(self, cell: Cell) -> bool: ...

    def attacked(
        self, cell: Cell, checkpoint: str, pair: Pair, span: Span | None = None
    ) -> bool: ...

    def transferred(self, cell: Cell) -> bool: ...

    def training(self, cell: Cell) -> Estimate: ...

    def attack(self, cell: Cell, pair: Pair, images: int) -> Estimate: ...


@dataclass(frozen=True)
class Share:
    """What a task may use, and how attacks are cut."""

    threads: int = 1
    gpu: float = 0.0
    shards: int = 1
    batch_size: int | None = None

    def spans(self, attack: AttackSpec, threat: ThreatModel, images: int) -> list[tuple[int, int]]:
        """The shards of an attack on the first of `images` test images.

        Outside the pool noise belongs to a batch: such attacks are cut between two batches.
        """
        pooled = isinstance(attack.build(threat), Pooled)
        step = 1 if pooled else self.batch_size or BATCH
        return slices(min(attack.limit or images, images), self.shards, step)


def request(spec: RunSpec) -> tuple[tuple[ThreatModel, ...], tuple[AttackSpec, ...]]:
    """The threat models and attacks of a request. Raises UsageError for what they cannot be."""
    threats = threat_models(spec)
    attacks = tuple(attack.at(spec.precision) for attack in spec.attacks)
    check_attacks(attacks, threats)
    return threats, attacks


def pairs(attacks: Sequence[AttackSpec], threats: Sequence[ThreatModel]) -> list[Pair]:
    """What a network from outside is attacked with: each attack under each threat model."""
    return [(attack, threat, "table") for threat in threats for attack in attacks]


def cell_pairs(
    attacks: Sequence[AttackSpec], threats: Sequence[ThreatModel], *, ranked: bool
) -> list[Pair]:
    """What a checkpoint of a cell is attacked with."""
    if not ranked:
        return pairs((UNRANKED,), threats)
    # The curves of Linf:4/255 and Linf:8/255 have points in common.
    points = dict.fromkeys(threat.scaled(factor) for threat in threats for factor in CURVE_FACTORS
                           if threat.norm != "Linf" or threat.eps * factor <= 1)
    return [*pairs(attacks, threats), *((CURVE, point, "curve") for point in points)]


def graph(
    cells: Iterable[Cell], rows: Iterable[Cell], attacks: Sequence[AttackSpec],
    threats: Sequence[ThreatModel], images: int, share: Share, known: Known, run: int = 0,
) -> list[Task]:
    """The tasks of one request: all cells are trained, the rows among them attacked.

    images: of the test set. Tasks come after those that they need.
    """
    tasks = []
    for cell in cells:
        done = known.trained(cell)
        tasks.append(Task(
            key=_train_key(run, cell), kind="train", label=f"train {cell.label}", run=run,
            owner=cell.spec.key(), threads=share.threads, gpu=share.gpu, done=done,
            needs=tuple(_train_key(run, teacher) for teacher in cell.teachers.values()
                        if isinstance(teacher, Cell)),
            estimate=known.training(cell)))
    for cell in rows:
        needs = (_train_key(run, cell),)
        for name in cell.checkpoints:
            chosen = cell_pairs(attacks, threats, ranked=name in cell.ranked)
            tasks += [task for index, pair in enumerate(chosen)
                      if pair[:2] not in [other[:2] for other in chosen[:index]]
                      for task in attack_tasks(
                          f"{run}/{cell.spec.key()}/{name}", f"{cell.label} {name}",
                          Task("", "attack", "", needs, run, cell.spec.key(), name, index,
                               threads=share.threads, gpu=share.gpu),
                          pair, images, share, known.attack(cell, pair, images),
                          partial(known.attacked, cell, name, pair))]
        if cell.crossed:
            tasks.append(Task(
                key=f"{run}/{cell.spec.key()}/rob_f", kind="transfer", run=run, needs=needs,
                label=f"{cell.label}: Rob_f", owner=cell.spec.key(), threads=share.threads,
                gpu=share.gpu, done=known.transferred(cell)))
    return tasks


def attack_tasks(
    prefix: str, label: str, task: Task, pair: Pair, images: int, share: Share,
    estimate: Estimate, made: Callable[[Span | None], bool],
) -> Iterator[Task]:
    """One attack on one network: itself, or its shards and the task that puts them together.

    Args:
        task: what is the same for all of them.
        made: whether the whole, or a shard, is there.
    """
    spec, threat, _ = pair
    done = made(None)
    # Its number: the curve over eps may attack fewer images under the same names.
    key = f"{prefix}/{task.pair}-{spec.slug}@{threat}"
    label = f"{label}: {spec.label} at {threat}"
    spans, shards = share.spans(spec, threat, images), list[Task]()
    if len(spans) > 1:
        total = spans[-1][1]
        for start, stop in spans:
            part = estimate.seconds and estimate.seconds * (stop - start) / total
            shards.append(replace(task, key=f"{key}[{start}:{stop}]", kind="shard",
                                  label=f"{label}, images {start} to {stop - 1}",
                                  span=(start, stop), estimate=estimate._replace(seconds=part),
                                  done=done or made((start, stop))))
    if shards:  # to put them together takes the time of one clean pass
        estimate = estimate._replace(seconds=estimate.seconds and 0.0)
    yield from shards
    yield replace(task, key=key, label=label, estimate=estimate, done=done,
                  needs=(*task.needs, *(shard.key for shard in shards)))


def _train_key(run: int, cell: Cell) -> str:
    return f"{run}/{cell.spec.key()}"


def pending(tasks: Iterable[Task]) -> list[Task]:
    """What is left to do; no task needs one that is not among them."""
    left = [task for task in tasks if not task.done]
    keys = {task.key for task in left}
    return [replace(task, needs=tuple(key for key in task.needs if key in keys)) for task in left]


def ready(left: Mapping[str, Task], running: Container[str], most: int) -> list[Task]:
    """The first ones, at most so many, whose turn it is: nothing they need is still to come."""
    turn = (task for task in left.values()
            if not any(key in left or key in running for key in task.needs))
    return list(islice(turn, most))


def without(left: Mapping[str, Task], failed: str) -> dict[str, Task]:
    """Without the tasks that need a failed one, or what does."""
    lost, kept = {failed}, dict[str, Task]()
    for key, task in left.items():  # they come after what they need
        if lost.isdisjoint(task.needs):
            kept[key] = task
        else:
            lost.add(key)
    return kept


def urgent_first(tasks: Sequence[Task]) -> list[Task]:
    """Those first with which the longest chains begin; what they need still comes before them."""
    height = {task.key: 1 for task in tasks}
    for task in reversed(tasks):
        for key in task.needs:
            height[key] = max(height[key], height[task.key] + 1)
    return sorted(tasks, key=lambda task: -height[task.key])


def critical_path(tasks: Sequence[Task]) -> list[Task]:
    """The chain that takes longest, as far as times are known; else that of most tasks."""
    ends: dict[str, tuple[float, int]] = {}
    before: dict[str, str] = {}
    for task in tasks:
        seconds, number = (0.0, 0) if task.done else (task.estimate.seconds or 0.0, 1)
        if task.needs:
            before[task.key] = max(task.needs, key=ends.__getitem__)
            earlier = ends[before[task.key]]
            seconds, number = seconds + earlier[0], number + earlier[1]
        ends[task.key] = seconds, number
    by_key, chain = {task.key: task for task in tasks}, list[Task]()
    key = max(ends, key=ends.__getitem__, default=None)
    while key is not None:
        chain.append(by_key[key])
        key = before.get(key)
    return chain[::-1]
