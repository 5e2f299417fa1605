"""Several processes that train together: found devices for, connected, watched and ended."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import signal
import socket
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess, parent_process
from typing import Any, cast

import torch
import torch.distributed as dist

from robench.defenses.distributed import Team
from robench.errors import RobenchError, UsageError, one_line


def check_devices(size: int, device: torch.device) -> None:
    """Raises UsageError if `size` processes cannot train, each on a device of this kind."""
    if importlib.util.find_spec("lightning_fabric") is None:
        raise UsageError('--devices needs Lightning Fabric: pip install "robench[devices]"')
    if device.index is not None:
        raise UsageError(f"--devices takes the first {size} GPUs, write --device {device.type} "
                         "with it; CUDA_VISIBLE_DEVICES chooses which those are")
    if device.type == "cuda" and size > torch.cuda.device_count():
        raise UsageError(f"--devices {size}: there are only {torch.cuda.device_count()} GPUs")


def launch(kind: str, size: int, function: Callable[..., None], *args: Any) -> None:
    """Run function(team, device, *args) in `size` processes, and wait for them.

    kind: "cpu" or "cuda". Function and arguments are sent to new interpreters by pickle.

    Raises RobenchError: the first that a process raised, or that one has died. However it ends,
    none of the processes is left.
    """
    context = torch.multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    port = _free_port()
    processes = [
        context.Process(target=_work, daemon=True,
                        args=(Team(rank, size), kind, port, failures, function, args))
        for rank in range(size)
    ]
    try:
        for process in processes:
            process.start()
        running = {process.sentinel: process for process in processes}
        while running:
            for sentinel in wait(list(running)):
                process = running.pop(cast(int, sentinel))
                process.join()
                if process.exitcode:
                    raise _cause(processes, failures)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()


def _cause(processes: Sequence[BaseProcess], failures: Any) -> RobenchError:
    """Why a process has failed. Those that outlive another complain of it."""
    killed = any((process.exitcode or 0) < 0 for process in processes)
    if killed or failures.empty():
        return RobenchError(f"one of {len(processes)} processes died, perhaps for want of memory; "
                            "what is finished is kept: run it again")
    error: RobenchError = failures.get()
    return error


def _work(
    team: Team, kind: str, port: int, failures: Any, function: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches the parent, too, who ends us
    threading.Thread(target=die_with_parent, daemon=True).start()
    try:
        function(team, _connected(team, kind, port), *args)
        dist.destroy_process_group()
    except BaseException as error:
        known = error if isinstance(error, RobenchError) else RobenchError(
            f"process {team.rank} of {team.size} failed: {one_line(error)}")
        known.add_note(traceback.format_exc())
        # The others fail as soon as this one is gone; the first to report is the cause.
        failures.put(known)
        os._exit(1)


def _connected(team: Team, kind: str, port: int) -> torch.device:
    """Join the team; returns the device of this process."""
    os.environ |= {"LOCAL_RANK": str(team.rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Fabric's own: of its imports, of GPUs that are not used
        fabric_module = importlib.import_module("lightning_fabric")
        environments = importlib.import_module("lightning_fabric.plugins.environments")
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
        # Named, so that the variables of a cluster's scheduler are not taken for ours.
        fabric = fabric_module.Fabric(accelerator=kind, devices=team.size, strategy="ddp",
                                      plugins=[environments.LightningEnvironment()])
        fabric.launch()
    device: torch.device = fabric.device
    return device


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def die_with_parent() -> None:
    """For a thread of a worker process: without its parent it is of no use."""
    parent = parent_process()
    assert parent is not None, "these processes have a parent"
    wait([parent.sentinel])
    os._exit(1)
