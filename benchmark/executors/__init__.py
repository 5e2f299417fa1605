"""Executors: they do the tasks of a run ahead, in other processes, here or elsewhere.

An executor only fills the folders of the cells. The command that asked for it then goes through
everything, takes what is there and does what is missing, so that a task that failed, or was done
twice, or by a process whose parent was killed, does no harm.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from robench.benchmark.gauge import using_threads
from robench.benchmark.graph import Share, Task, pending
from robench.benchmark.progress import Reporter
from robench.benchmark.sources import cores
from robench.benchmark.spec import RunSpec
from robench.errors import UsageError


@dataclass(frozen=True)
class Request:
    """What a worker must know.

    Attributes:
        specs: of the matrices; of `eval` one, with the networks in `sources`.
        end: of the time budget, as time.time(). zoo, replay: as in `evaluate_external`.
    """

    specs: tuple[RunSpec, ...]
    sources: tuple[str, ...] = ()
    zoo: Path = Path("models")
    replay: Path | None = None
    end: float | None = None


def threads_of(spec: RunSpec) -> int:
    """Threads of torch in each process: the same for every executor."""
    # OpenMP allows "4,2", for threads within threads.
    variable = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    named = spec.threads or (int(variable) if variable.isdecimal() else 0)
    return named or max(1, cores() // spec.jobs)


def share_of(spec: RunSpec, device: torch.device) -> Share:
    gpu = spec.gpus_per_task if device.type == "cuda" else 0.0
    return Share(threads_of(spec), gpu, spec.shards, spec.batch_size)


@contextmanager
def using(spec: RunSpec) -> Iterator[None]:
    """With the threads that a request names, if it does, in this process, too."""
    with using_threads(spec.threads):
        yield


def check_executor(spec: RunSpec) -> None:
    """Raises UsageError where the executor is not there, or not for this request."""
    if spec.executor == "ray" and importlib.util.find_spec("ray") is None:
        raise UsageError('--executor ray needs Ray: pip install "robench[ray]"')
    if spec.executor == "ray" and ":" in spec.device:
        raise UsageError(f"--device {spec.device}: Ray chooses the GPU of every task; write "
                         f"--device {spec.device.partition(':')[0]}")
    if spec.executor != "ray" and spec.ray_address is not None:
        raise UsageError("--ray-address is for --executor ray")


def work_ahead(request: Request, tasks: Sequence[Task], reporter: Reporter) -> int:
    """Do what is left of the tasks. Returns how many measurements were made.

    Raises RobenchError if a process dies; what it was at is resumed by the next run.
    """
    left, spec = pending(tasks), request.specs[0]
    if not left:
        return 0
    if spec.executor == "ray":
        from robench.benchmark.executors import ray

        return ray.work_ahead(request, left, reporter)
    if spec.jobs > 1:
        from robench.benchmark.executors import local

        return local.work_ahead(request, left, reporter)
    return 0
