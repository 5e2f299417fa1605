"""Several processes on one machine. They fill the folders of the cells; `run` then finds all there.

Every task is idempotent and writes whole files, so a task that is done twice, or by a process
whose parent was killed, does no harm.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import torch

from robench.benchmark.cells import Cell
from robench.benchmark.matrix import Matrix
from robench.benchmark.progress import Reporter
from robench.benchmark.spec import RunSpec
from robench.errors import RobenchError

_matrix: Matrix  # of this worker process
_cells: dict[str, Cell]


def work_ahead(matrix: Matrix, cells: Sequence[Cell], rows: Sequence[Cell]) -> int:
    """Train all cells, then attack the networks of all rows, in `matrix.spec.jobs` processes.

    Returns how many measurements were made. The rest, and every failure, is left to the caller,
    who goes through everything again and does what is still missing.
    """
    spec, quiet = matrix.spec, matrix.reporter.quiet
    threads = max(1, (os.cpu_count() or 1) // spec.jobs)
    # spawn: a forked child inherits torch's thread pools in an unusable state
    with ProcessPoolExecutor(
        spec.jobs, get_context("spawn"), initializer=_start, initargs=(spec, threads, quiet)
    ) as pool:
        try:
            done = {cell.spec.key() for cell in cells if cell.result() is not None}
            while wave := [c for c in cells if c.spec.key() not in done and _ready(c, done)]:
                _wait([pool.submit(_guarded, "train", cell.spec.key()) for cell in wave])
                done |= {cell.spec.key() for cell in wave}
            trained = [cell for cell in rows if cell.result() is not None]
            tasks: list[tuple[str, Cell, tuple[str, ...]]]
            tasks = [("records", cell, (name,)) for cell in trained for name in cell.checkpoints
                     if matrix.pending(cell, name)]
            return _wait([pool.submit(_guarded, task, cell.spec.key(), *arguments)
                          for task, cell, arguments in tasks])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _ready(cell: Cell, done: set[str]) -> bool:
    return all(not isinstance(t, Cell) or t.spec.key() in done for t in cell.teachers.values())


def _wait(futures: list[Future[int]]) -> int:
    return sum(future.result() for future in as_completed(futures))


def _start(spec: RunSpec, threads: int, quiet: bool) -> None:
    global _matrix, _cells
    torch.set_num_threads(threads)
    _matrix = Matrix(spec, Reporter(quiet=quiet, bars=False))
    _cells = {cell.spec.key(): cell for cell in _matrix.plan()[0]}


def _guarded(task: str, key: str, *arguments: str) -> int:
    """Do one task of this process's matrix; returns how many measurements it took."""
    before = _matrix.measured
    tasks: dict[str, Callable[..., object]] = {"train": _matrix.train, "records": _matrix.records}
    with contextlib.suppress(RobenchError):
        tasks[task](_cells[key], *arguments)
    return _matrix.measured - before
