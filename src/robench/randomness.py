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


def generators() -> list[torch.Tensor]:
    """The states of torch's global generators, of the CPU and of each GPU in use."""
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda_devices())]


def set_generators(states: list[torch.Tensor]) -> None:
    """What `generators` returned, on the same number of GPUs."""
    cpu, *gpus = (state.cpu() for state in states)
    torch.set_rng_state(cpu)
    for device, state in zip(cuda_devices(), gpus, strict=True):
        torch.cuda.set_rng_state(state, device)


@contextmanager
def seeded(seed: int, *names: object) -> Iterator[None]:
    """Seed torch's global generators inside; restore them afterwards."""
    with torch.random.fork_rng(devices=cuda_devices()):
        torch.manual_seed(derive(seed, *names))
        yield
