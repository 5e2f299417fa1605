"""Several processes on one machine. They fill the folders of the cells; `run` then finds all there.

Every task is idempotent and writes whole files, so a task that is done twice, or by a process
whose parent was killed, does no harm.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import util
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue

import torch

from robench.benchmark.cells import Cell
from robench.benchmark.matrix import Matrix
from robench.benchmark.progress import Message, Remote, Reporter, relayed
from robench.benchmark.sources import cores
from robench.benchmark.spec import RunSpec
from robench.defenses.launch import die_with_parent
from robench.errors import RobenchError, UsageError

PATIENCE = 10.0  # seconds that a worker has for the step it is at when it is told to end
_matrix: Matrix  # of this worker process
_cells: dict[str, Cell]


def work_ahead(matrix: Matrix, cells: Sequence[Cell], rows: Sequence[Cell]) -> int:
    """Train all cells, then attack the networks of all rows, in `matrix.spec.jobs` processes.

    Returns how many measurements were made. The rest, and every failure, is left to the caller,
    who goes through everything again and does what is still missing. Raises RobenchError if a
    process dies.
    """
    with _pool(matrix.spec, matrix.reporter) as pool:
        tried: set[str] = set()
        while wave := [cell for cell in cells if cell.spec.key() not in tried
                       and cell.result() is None and _taught(cell)]:
            _wait([pool.submit(_train, cell.spec.key()) for cell in wave])
            tried |= {cell.spec.key() for cell in wave}
        return _wait([pool.submit(_attack, cell.spec.key(), name)
                      for cell in rows if cell.result() is not None
                      for name in cell.checkpoints if _pending(matrix, cell, name)])


def _taught(cell: Cell) -> bool:
    return all(not isinstance(t, Cell) or t.result() is not None for t in cell.teachers.values())


def _pending(matrix: Matrix, cell: Cell, name: str) -> bool:
    try:
        return matrix.pending(cell, name)
    except UsageError:  # damaged: the caller will say so
        return False


def _wait(futures: list[Future[int]]) -> int:
    return sum(future.result() for future in as_completed(futures))


@contextlib.contextmanager
def _pool(spec: RunSpec, reporter: Reporter) -> Iterator[ProcessPoolExecutor]:
    """Processes are started when there is work; their progress is shown by `reporter`."""
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, cores() // spec.jobs)
    with relayed(reporter) as messages:
        # spawn: a forked child inherits torch's thread pools in an unusable state
        pool = ProcessPoolExecutor(spec.jobs, multiprocessing.get_context("spawn"),
                                   initializer=_start, initargs=(spec, threads, messages))
        others = set(multiprocessing.active_children())
        try:
            yield pool
        except BaseException as error:  # nobody waits for what the workers are doing now
            _end(set(multiprocessing.active_children()) - others)
            if isinstance(error, BrokenProcessPool):
                raise RobenchError("a worker process died, perhaps for want of memory; what is "
                                   "finished is kept: run it again with --jobs 1") from None
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _end(workers: Iterable[BaseProcess]) -> None:
    """None of the workers is left: they may keep what they have, those that hang lose it."""
    for worker in workers:
        worker.terminate()
    last = time.monotonic() + PATIENCE
    for worker in workers:
        worker.join(max(0.0, last - time.monotonic()))
        worker.kill()
        worker.join()


def _start(spec: RunSpec, threads: int, messages: Queue[Message]) -> None:
    global _matrix, _cells
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches the parent, too, who ends us
    threading.Thread(target=die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _matrix = Matrix(spec, Remote(messages))
    _cells = {cell.spec.key(): cell for cell in _matrix.plan()[0]}
    signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(1)


@contextlib.contextmanager
def _task() -> Iterator[None]:
    """What fails is left to the parent; told to end, the process does so after its step."""
    try:
        with contextlib.suppress(RobenchError):
            yield
    except SystemExit:  # which the pool would take for the result
        util._exit_function()  # type: ignore[attr-defined]
        os._exit(1)


def _train(key: str) -> int:
    with _task():
        _matrix.train(_cells[key])
    return 0


def _attack(key: str, checkpoint: str) -> int:
    before = _matrix.measured
    with _task():
        _matrix.records(_cells[key], checkpoint)
    return _matrix.measured - before
