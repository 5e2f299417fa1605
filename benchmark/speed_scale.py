"""speed scale: what executors and shards take besides the work."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from robench.benchmark.executors import Request, share_of, using
from robench.benchmark.executors.work import Worker
from robench.benchmark.facts import Subject
from robench.benchmark.gauge import Spread, rotating
from robench.benchmark.graph import Pair, Task
from robench.benchmark.kept import discard
from robench.benchmark.matrix import Matrix
from robench.benchmark.progress import Reporter
from robench.benchmark.provenance import environment
from robench.benchmark.references import csv_text, machine
from robench.benchmark.spec import AttackSpec, RunSpec
from robench.errors import RobenchError, UsageError
from robench.files import locked, write_atomic
from robench.reports.scaling import Point, scaling_figure
from robench.reports.style import to_png, to_svg
from robench.reports.text import NOTHING, Board, Cell, Column, markdown

TRAINING: dict[str, Any] = {"epochs": 3, "validation": 0, "select": "last", "swa_start": None}
TINY = 8  # images under the attack whose file is there already

Run = Callable[[int], int]  # so many tasks, or shards -> images that stand, -1 for no matter


@dataclass(frozen=True)
class Contender:
    """Something that is run with several numbers of tasks or shards."""

    part: str  # "tasks" or "shards"
    name: str
    run: Run
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Line:
    """A contender with one number of tasks or shards.

    Attributes:
        seconds: wall time. each: seconds more than with one, for each that is more; None for one.
        robust: images that stand, -1 where nothing is attacked.
    """

    part: str
    contender: str
    number: int
    seconds: Spread
    each: Spread | None
    robust: int


def speed_scale(
    spec: RunSpec, *, tasks: int = 1000, shards: Sequence[int] = (1, 2, 4, 8), repeats: int = 3,
    quiet: bool = True,
) -> str:
    """Time tasks whose files are there already in each executor, and one attack in shards.

    One network is trained for it, by pgd-at. What a task takes besides its work is the slope
    over the number of tasks; what its process takes to begin is the time of a single one. Each
    executor has one process, so that nothing runs beside anything. Writes speed-scale.csv, .md,
    .png and .svg to spec.out; returns the Markdown.

    Args:
        spec: its first attack is the one that is cut into shards.
        tasks: at most so many. shards: numbers of them, one among them.

    Raises UsageError for numbers below one.
    """
    numbers = tuple(sorted({1, *shards}))
    if tasks < 2 or numbers[0] < 1:
        raise UsageError("--tasks: write 2 or more; --shards: 1 or more, for example 1,2,4,8")
    reporter = Reporter(quiet=quiet)
    spec = spec.model_copy(update={
        "defenses": ("pgd-at",), "epochs": TRAINING["epochs"], "jobs": 1, "shards": 1,
        "train": {name: value for name, value in TRAINING.items() if name != "epochs"}})
    with locked(spec.out), using(spec):
        matrix = Matrix(spec, reporter)
        (cell,), _ = matrix.plan()
        matrix.train(cell)
        matrix.reporter = Reporter(quiet=True)  # the screen is no part of what is timed
        subject = matrix.subject(cell, cell.ranked[0])
        contenders = [*_executors(spec, tasks, reporter), Contender(
            "shards", matrix.attacks[0].label, _sharded(matrix, subject, cell.spec.seed), numbers)]
        lines = _measured(contenders, repeats, reporter)
    facts = _facts(matrix, str(cell.spec.model), repeats)
    rows = [_row(line, matrix) for line in lines]
    text = "\n".join(markdown(board) for board in _boards(lines, facts))
    figure = scaling_figure([Point(line.part, line.contender, line.number, *line.seconds)
                             for line in lines])
    for suffix, content in (("csv", csv_text(rows)), ("md", text), ("png", to_png(figure)),
                            ("svg", to_svg(figure, "speed-scale"))):
        write_atomic(spec.out / f"speed-scale.{suffix}", content)
    return text


def _executors(spec: RunSpec, tasks: int, reporter: Reporter) -> list[Contender]:
    """Those that are there, on copies of one task that finds its file."""
    tiny = spec.model_copy(update={"attacks": (AttackSpec(name="fgsm"),), "limit": TINY})
    matrix, request = Matrix(tiny, Reporter(quiet=True)), Request((tiny,))
    cells, rows = matrix.plan()
    matrix.collect(cells, rows)
    task = next(task for task in matrix.tasks(cells, rows) if task.kind == "attack" and task.done)

    def copies(number: int) -> list[Task]:
        return [replace(task, key=str(i), needs=(), done=False) for i in range(number)]

    def checked(measured: int) -> int:
        if measured:
            raise RobenchError("an executor did work that was done: its times mean nothing")
        return -1

    def here(number: int) -> int:
        worker = Worker(request, Reporter(quiet=True))
        outcomes = [worker.do(one) for one in copies(number)]
        return checked(sum(one.measured + (not one.done) for one in outcomes))

    def ahead(executor: str, number: int) -> int:
        module = importlib.import_module(f"robench.benchmark.executors.{executor}")
        return checked(module.work_ahead(request, copies(number), Reporter(quiet=True)))

    runs: dict[str, Run] = {"this process": here, "local": partial(ahead, "local")}
    if importlib.util.find_spec("ray") is not None:
        runs["ray"] = partial(ahead, "ray")
    else:
        reporter.warn('Ray is not installed and not measured: pip install "robench[ray]"')
    numbers = tuple(sorted({1, max(2, tasks // 4), max(2, tasks // 2), tasks}))
    return [Contender("tasks", name, run, numbers) for name, run in runs.items()]


def _sharded(matrix: Matrix, subject: Subject, seed: int) -> Run:
    """The first attack in so many shards, one after the other in this process, from scratch."""
    pair: Pair = (matrix.attacks[0], matrix.threat, "table")
    path = matrix.path(subject, pair, seed)
    matrix.target(subject)  # the clean pass is the same for all

    def run(number: int) -> int:
        discard(path)
        path.unlink(missing_ok=True)
        matrix.share = share_of(matrix.spec.model_copy(update={"shards": number}), matrix.device)
        (record,) = matrix.attack(subject, [pair], seed)
        if record.status != "ok":
            raise RobenchError(f"{record.attack} failed: {record.error}")
        return record.n_robust

    return run


def _measured(
    contenders: Sequence[Contender], repeats: int, reporter: Reporter
) -> list[Line]:
    """All in turn, `repeats` times."""
    turns = [(contender, number) for contender in contenders for number in contender.numbers]
    seconds: list[list[float]] = [[] for _ in turns]
    robust = [-1] * len(turns)
    with reporter.task("speed scale") as update:
        for done, turn in enumerate(rotating(len(turns), repeats)):
            contender, number = turns[turn]
            began = time.perf_counter()
            robust[turn] = contender.run(number)
            seconds[turn].append(time.perf_counter() - began)
            update((done + 1) / (repeats * len(turns)), f"{contender.name}, {number}")
    single = {contender: seconds[i] for i, (contender, number) in enumerate(turns) if number == 1}
    return [
        Line(contender.part, contender.name, number, Spread.of(seconds[i]),
             None if number == 1 else Spread.of(
                 [(many - one) / (number - 1)
                  for many, one in zip(seconds[i], single[contender], strict=True)]),
             robust[i])
        for i, (contender, number) in enumerate(turns)
    ]


def _facts(matrix: Matrix, model: str, repeats: int) -> tuple[str, ...]:
    return (
        f"{model}, {matrix.dataset.name}, {matrix.threat}, {len(matrix.test)} images",
        machine(matrix.device),
        f"{repeats} repeats in turn: median (least to most); one process for each executor",
    )


def _row(line: Line, matrix: Matrix) -> dict[str, Any]:
    values = asdict(line)
    for key in ("seconds", "each"):
        spread = values.pop(key)
        values |= dict(zip((key, f"{key}_min", f"{key}_max"), spread or ("", "", ""), strict=True))
    facts = environment(matrix.device)
    del facts["peak_bytes"]
    return {**values, "dataset": matrix.dataset.name, "threat": str(matrix.threat),
            "n": len(matrix.test), **facts}


def _boards(lines: Sequence[Line], facts: tuple[str, ...]) -> list[Board]:
    def board(part: str, title: str, number: str, each: str, *notes: str) -> Board:
        some = [line for line in lines if line.part == part]
        robust = [Column("Robust", tuple(Cell(str(line.robust)) for line in some))]
        return Board(title, (
            Column("What", tuple(Cell(line.contender) for line in some), words=True),
            Column(number, tuple(Cell(f"{line.number:,}") for line in some)),
            Column("Seconds", tuple(Cell(str(line.seconds)) for line in some)),
            Column(each, tuple(Cell(NOTHING if line.each is None else str(line.each.scaled(1e3)))
                               for line in some)),
            *(robust if part == "shards" else []),
        ), (*facts, *notes))

    return [
        board("tasks", "Executors", "Tasks", "ms for each more",
              "tasks whose files are there already: what is left is the executor's, the graph's, "
              "and reading the file; a single one: imports, data and the first plan"),
        board("shards", "Shards", "Shards", "ms for each more",
              "all shards one after the other in one process, put together in one record"),
    ]
