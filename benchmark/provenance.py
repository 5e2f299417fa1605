"""Where a number comes from: versions, commit, device, memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

import robench


@cache
def commit() -> str:
    """The commit of the robench checkout, "+dirty" appended if it is changed; "" elsewhere."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True,
                              timeout=20, check=True)
        return done.stdout.strip()

    try:
        # An installed copy may lie inside somebody else's repository.
        if not git("ls-files", Path(__file__).name):
            return ""
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return device.type


def peak_bytes(device: torch.device) -> int:
    """Peak memory of the process on the CPU, of the allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def now() -> str:
    """UTC, ISO 8601: the `created` of a row."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment(device: torch.device) -> dict[str, Any]:
    """The fields of a Record that describe the machine and the moment."""
    return {
        "created": now(),
        "robench": robench.__version__,
        "torch": torch.__version__,
        "device": device_name(device),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "peak_bytes": peak_bytes(device),
    }


def environments(made: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """One `environment` for what several processes made, and a note where they were unlike: the
    last bits of `exact` depend on the device and the threads."""
    notes = []
    for name in ("device", "threads", "torch", "robench"):
        values = sorted({str(one[name]) for one in made})
        if len(values) > 1:
            notes.append(f"shards: not all were made with the same {name}: {', '.join(values)}")
    latest = {name: max(one[name] for one in made) for name in ("created", "peak_bytes")}
    return {**made[0], **latest}, tuple(notes)
