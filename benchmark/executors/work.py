"""What a worker process does with a task, whoever started it."""

from __future__ import annotations

from typing import NamedTuple

from robench.benchmark.cells import Cell
from robench.benchmark.executors import Request
from robench.benchmark.external import opened, outside
from robench.benchmark.graph import Task, pairs
from robench.benchmark.matrix import Matrix, Subject
from robench.benchmark.progress import Reporter
from robench.benchmark.sources import load_network
from robench.errors import DiskError, RobenchError


class Outcome(NamedTuple):
    """How many measurements a task made, and whether it left what others wait for."""

    measured: int
    done: bool


class Worker:
    """Does tasks one after the other; one data set and one attacked network are in memory."""

    def __init__(self, request: Request, reporter: Reporter) -> None:
        self._request, self._reporter = request, reporter
        self._matrix: tuple[int, Matrix, dict[str, Cell]] | None = None
        self._subject: tuple[Task, Subject] | None = None

    def do(self, task: Task) -> Outcome:
        """Leave the task's file. A training or a network that fails is left to the parent, who
        will say so.

        Raises RobenchError where the parent had no trouble, so that this machine has: it would
        fail at every task it is given. DiskError: nothing could be kept from here on.
        """
        matrix, cells = self._open(task.run)
        before = matrix.measured
        try:
            if task.kind == "train":
                matrix.train(cells[task.owner])
            elif task.kind == "transfer":
                matrix.transfers(cells[task.owner])
            else:
                self._attack(matrix, cells.get(task.owner), task)
        except RobenchError as error:
            if isinstance(error, DiskError) or self._request.sources:
                raise
            return Outcome(0, False)
        return Outcome(matrix.measured - before, True)

    def _open(self, run: int) -> tuple[Matrix, dict[str, Cell]]:
        if self._matrix is None or self._matrix[0] != run:
            self._matrix = self._subject = None  # before the next one takes memory
            matrix = opened(self._request, run, self._reporter)
            cells = [] if self._request.sources else matrix.plan()[0]
            self._matrix = run, matrix, {cell.spec.key(): cell for cell in cells}
        return self._matrix[1:]

    def _attack(self, matrix: Matrix, cell: Cell | None, task: Task) -> None:
        last = self._subject
        if last is None or (last[0].owner, last[0].checkpoint) != (task.owner, task.checkpoint):
            self._subject = None
            if cell is not None:
                subject = matrix.subject(cell, task.checkpoint)
            else:
                subject = outside(matrix, load_network(
                    task.owner, matrix.dataset, matrix.threats[0], model=matrix.spec.model,
                    zoo=self._request.zoo))
            last = self._subject = task, subject
        if cell is None:
            seed, chosen = matrix.spec.seeds[0], pairs(matrix.attacks, matrix.threats)
        else:
            seed, chosen = cell.spec.seed, matrix.pairs(cell, task.checkpoint)
        subject, pair = last[1], chosen[task.pair]
        if task.span is None:
            list(matrix.attack(subject, [pair], seed))
        else:
            matrix.shard(subject, pair, seed, task.span)
