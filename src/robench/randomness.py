"""Seeds. Every random stream is named, so that what runs before it cannot change it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *names: object) -> int:
    """A seed in [0, 2^63) for the stream called `names` of a run with this seed."""
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def cuda_devices() -> list[int]:
    """The GPUs with generators worth saving: none before CUDA is in use, then all."""
    used = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    return list(range(torch.cuda.device_count())) if used else []


def generators(device: torch.device) -> list[torch.Tensor]:
    """The states of torch's global generators, of the CPU and of the device if it is a GPU."""
    gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *gpu]


def set_generators(states: list[torch.Tensor], device: torch.device) -> None:
    """What `generators` returned, of this device or another one: a GPU goes on where another one
    was. What began on a CPU has no state for a GPU, whose generator then stays as it is."""
    cpu, *gpu = (state.cpu() for state in states)
    torch.set_rng_state(cpu)
    if gpu and device.type == "cuda":
        torch.cuda.set_rng_state(gpu[0], device)


@contextmanager
def seeded(seed: int, *names: object) -> Iterator[None]:
    """Seed torch's global generators inside; restore them afterwards."""
    with torch.random.fork_rng(devices=cuda_devices()):
        torch.manual_seed(derive(seed, *names))
        yield
