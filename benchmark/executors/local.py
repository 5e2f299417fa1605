"""Several processes on one machine, which do the tasks whose turn it is."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import util
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from typing import Any, cast

import torch

from robench.benchmark.executors import Request, threads_of
from robench.benchmark.executors.work import Outcome, Worker
from robench.benchmark.graph import Task, ready, urgent_first, without
from robench.benchmark.progress import Message, Remote, Reporter, relayed
from robench.defenses.launch import die_with_parent
from robench.errors import RobenchError

PATIENCE = 10.0  # seconds that a worker has for the step it is at when it is told to end
_worker: Worker  # of this process
_leaving = False  # so is this


def work_ahead(request: Request, tasks: Sequence[Task], reporter: Reporter) -> int:
    """Do the tasks in `jobs` processes; see `executors.work_ahead`.

    A task is given away when all that it needs is done and a process is free; those with the
    longest chains behind them go first, then in their order. What needs a task that failed is
    left to the caller.
    """
    jobs, left = request.specs[0].jobs, {task.key: task for task in urgent_first(tasks)}
    flying: dict[Future[Outcome], str] = {}
    measured = 0
    with _pool(request, reporter) as pool:
        while True:
            for task in ready(left, flying.values(), jobs - len(flying)):
                flying[pool.submit(_do, left.pop(task.key))] = task.key
            if not flying:
                return measured
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                key, outcome = flying.pop(future), future.result()
                measured += outcome.measured
                if not outcome.done:
                    left = without(left, key)


@contextlib.contextmanager
def _pool(request: Request, reporter: Reporter) -> Iterator[ProcessPoolExecutor]:
    """Processes are started when there is work; their progress is shown by `reporter`."""
    # spawn: a forked child inherits torch's thread pools in an unusable state
    context, jobs = multiprocessing.get_context("spawn"), request.specs[0].jobs
    places = context.SimpleQueue()
    for place in range(jobs):
        places.put(place)
    with relayed(reporter) as messages:
        pool = ProcessPoolExecutor(jobs, context, initializer=_start,
                                   initargs=(request, messages, places))
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


def _start(request: Request, messages: Queue[Message], places: Any) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches the parent, too, who ends us
    threading.Thread(target=die_with_parent, daemon=True).start()
    torch.set_num_threads(threads_of(request.specs[0]))
    _choose_gpu(request.specs[0].device, places.get())
    _worker = Worker(request, Remote(messages))
    signal.signal(signal.SIGTERM, _leave)


def _choose_gpu(device: str, place: int) -> None:
    """Make one of several GPUs the one that "cuda" means here; none is touched but for that."""
    if device in ("auto", "cuda") and torch.cuda.device_count() > 1:
        torch.cuda.set_device(place % torch.cuda.device_count())


def _leave(number: int, frame: object) -> None:
    """Once: the scheduler, the pool that lost a process and `_end` may all tell a worker to end,
    and a second exit in the middle of the first would cut short what is kept."""
    global _leaving
    if not _leaving:
        _leaving = True
        raise SystemExit(1)


def _do(task: Task) -> Outcome:
    """Told to end, the process does so after its step."""
    try:
        return _worker.do(task)
    except SystemExit:  # which the pool would take for the result
        cast(Any, util)._exit_function()  # which os._exit leaves out
        os._exit(1)
