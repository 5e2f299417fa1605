"""Ray: the tasks of a run on the machines of a cluster, or on this one.

Ray decides when and where, waits for what a task needs, and does it again when its machine is
lost. All machines see the output folder at the same path, and so does the current folder.
"""

from __future__ import annotations

import importlib
import os
import platform
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from robench.benchmark.executors import Request, threads_of
from robench.benchmark.executors.work import Outcome, Worker
from robench.benchmark.graph import Task, urgent_first
from robench.benchmark.progress import Message, Remote, Reporter
from robench.errors import RobenchError, UsageError, one_line
from robench.files import LOCK

RETRIES = 5  # of a task whose machine, or process, is lost
PATIENCE = 10.0  # seconds that tasks have for the step they are at when they are told to end
STORE = 100 * 2**20  # bytes for objects: results are a few numbers, images go by files
Machine = Mapping[str, float]  # what Ray says it has
_worker: tuple[Request, str, Worker] | None = None  # of this process, and its GPU


def work_ahead(request: Request, tasks: Sequence[Task], reporter: Reporter) -> int:
    """Do the tasks on a Ray cluster; see `executors.work_ahead`."""
    ray: Any = importlib.import_module("ray")
    refs: dict[str, Any] = {}
    with _joined(ray, request), _relayed(ray, reporter) as messages:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        _check_room(machines, tasks[0], reporter)
        # Without max_calls a process would end after every task that had a GPU.
        remote = ray.remote(max_calls=0, max_retries=RETRIES)(_perform)
        for task in urgent_first(tasks):
            refs[task.key] = remote.options(
                name=task.label, num_cpus=task.threads, num_gpus=task.gpu,
                memory=_memory(task, machines),
            ).remote(request, task, messages, os.getcwd(), *(refs[key] for key in task.needs))
        return _finished(ray, list(refs.values()))


def _memory(task: Task, machines: Sequence[Machine]) -> int | None:
    """Bytes to ask for, so that no machine takes more tasks than fit: the peak of earlier ones,
    but no more than the largest machine has, or it would wait forever. None: unknown, or a GPU's.
    """
    most = max((machine.get("memory", 0) for machine in machines), default=0)
    return None if task.gpu else int(min(task.estimate.memory or 0, most)) or None


def _check_room(machines: Sequence[Machine], task: Task, reporter: Reporter) -> None:
    """Ray waits without a word for what no machine has: another one may join."""
    wanted = {"CPU": task.threads, "GPU": task.gpu}
    if not any(all(machine.get(kind, 0) >= number for kind, number in wanted.items())
               for machine in machines):
        reporter.warn(f"no machine of this Ray has {task.threads} CPUs and {task.gpu:g} GPUs, "
                      "which every task asks for (--threads, --gpus-per-task): they wait for one "
                      "to join")


def _finished(ray: Any, left: list[Any]) -> int:
    """Wait for all; how many measurements were made. Whatever ends it ends the tasks, too."""
    measured, everything = 0, list(left)
    try:
        while left:
            ready, left = ray.wait(left)
            measured += sum(outcome.measured for outcome in ray.get(ready))
    except BaseException as error:
        for ref in everything:
            ray.cancel(ref)
        ray.wait(everything, num_returns=len(everything), timeout=PATIENCE)
        if isinstance(error, ray.exceptions.RayTaskError):
            cause = error.cause
            raise (cause if isinstance(cause, RobenchError)
                   else RobenchError(one_line(cause))) from None
        if isinstance(error, ray.exceptions.RayError):
            raise RobenchError(f"a worker was lost {RETRIES + 1} times; what is finished is kept: "
                               f"run it again ({one_line(error)})") from None
        raise
    return measured


@contextmanager
def _joined(ray: Any, request: Request) -> Iterator[None]:
    """Connected with the cluster that is named, or a new one on this machine. One that this
    process is connected with already is used as it is."""
    if ray.is_initialized():
        yield
        return
    spec, before = request.specs[0], signal.getsignal(signal.SIGTERM)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Else a FutureWarning tells everybody about this variable.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if spec.ray_address is None:
        options |= {"address": "local", "num_cpus": spec.jobs * threads_of(spec),
                    "include_dashboard": False, "object_store_memory": STORE}
    else:
        options["address"] = spec.ray_address
    try:
        ray.init(**options)
    except Exception as error:  # of all kinds, without a common one
        if spec.ray_address is None:
            raise RobenchError("Ray did not start on this machine, which may be busy: run it again "
                               f"({one_line(error)})") from None
        raise UsageError(f"there is no Ray at {spec.ray_address} ({one_line(error)})") from None
    try:
        _restore(before)  # which Ray replaces
        yield
    finally:
        ray.shutdown()


def _restore(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGTERM, handler)


class _Messages:
    """The way of progress from the workers to the command: through an actor beside it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def put(self, message: Message) -> None:
        self._actor.put_nowait.remote(message)  # nobody waits: it only informs


@contextmanager
def _relayed(ray: Any, reporter: Reporter) -> Iterator[_Messages]:
    queues, strategies = (importlib.import_module(f"ray.util.{name}")
                          for name in ("queue", "scheduling_strategies"))
    here = strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), False)
    queue = queues.Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    screen = threading.Thread(target=reporter.relay, args=(_Ending(queue),), daemon=True)
    screen.start()
    try:
        yield _Messages(queue.actor)
    finally:
        queue.actor.put_nowait.remote(("end", None, None, None))
        screen.join(5)


class _Ending:
    """A queue that ends with the cluster, and says so."""

    def __init__(self, queue: Any) -> None:
        self._queue, self._gone = queue, False

    def get(self) -> Message:
        if self._gone:
            return "end", None, None, None
        try:
            message: Message = self._queue.get()
            return message
        except Exception as error:  # of all kinds: a lost actor, a lost connection
            self._gone = True
            return ("warn", None, "no progress is shown from here on: Ray's queue is gone "
                    f"({one_line(error)})", None)


def _perform(
    request: Request, task: Task, messages: _Messages, folder: str, *before: Outcome
) -> Outcome:
    """What a machine of the cluster does. before: what became of what the task needs."""
    global _worker
    if not all(outcome.done for outcome in before):
        return Outcome(0, False)
    gpu = _choose_gpu(importlib.import_module("ray").get_gpu_ids())
    if _worker is None or _worker[:2] != (request, gpu):
        _worker = None  # before the next one takes memory
        out = request.specs[0].out
        try:
            os.chdir(folder)
            found = (Path(folder) / out / LOCK).exists()
        except OSError:
            found = False
        if not found:
            raise RobenchError(f"{out} in {folder} is not shared with the other machines: name a "
                               "folder that all of them see with --out, and start robench in one")
        torch.set_num_threads(task.threads)  # whatever the variables here say
        _worker = request, gpu, Worker(request, Remote(messages))
    try:
        return _worker[2].do(task)
    except RobenchError as error:
        raise RobenchError(f"{platform.node()}: {error}") from None


def _choose_gpu(given: Sequence[int | str]) -> str:
    """Make the GPU that Ray gives to a task the one of torch; its name, "" for none.

    Ray names it in CUDA_VISIBLE_DEVICES, which CUDA reads once, and may give another one to the
    next task of the same process. So all are visible, by the numbers that Ray uses.
    """
    name = str(given[0]) if given else ""
    if name.isdecimal():  # not the name of a slice, which has no number
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(name))
    return name
