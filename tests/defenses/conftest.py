"""Tiny networks and data, and a keeper that lives in memory."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench.defenses.trainer import Watcher


@dataclass
class MemoryKeeper:
    """Keeps bytes, as a disk does: what is kept cannot change with the networks."""

    state: bytes | None = None
    networks: dict[str, tuple[int, dict[str, Tensor]]] = field(default_factory=dict)

    def load_state(self) -> dict[str, Any] | None:
        return None if self.state is None else torch.load(io.BytesIO(self.state), weights_only=True)

    def save_state(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.state = buffer.getvalue()

    def save_network(self, name: str, net: nn.Module, epoch: int) -> None:
        self.networks[name] = epoch, {k: v.clone() for k, v in net.state_dict().items()}

    @property
    def epochs(self) -> dict[str, int]:
        """Checkpoint -> the epoch it is from."""
        return {name: epoch for name, (epoch, _) in self.networks.items()}


@dataclass
class StopAfter(Watcher):
    """Presses Ctrl-C after so many steps."""

    steps: int

    def step(self, epoch: int, step: int, steps: int) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="session")
def make_keeper() -> Callable[[], MemoryKeeper]:
    return MemoryKeeper


@pytest.fixture(scope="session")
def stop_after() -> Callable[[int], StopAfter]:
    return StopAfter


@pytest.fixture(scope="session")
def make_net() -> Callable[..., nn.Module]:
    """seed -> a convolution, batch-norm and a linear layer for (N, 1, 4, 4) and 3 classes."""

    def make(seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                nn.Linear(64, 3),
            )
        return net.to(memory_format=torch.channels_last)

    return make


@pytest.fixture(scope="session")
def make_data() -> Callable[..., tuple[Tensor, Tensor]]:
    """(n, seed) -> images (n, 1, 4, 4) whose label is the brightest of three rows."""

    def make(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(n, 1, 4, 4, generator=generator)
        return x, x[:, 0, :3].mean(2).argmax(1)

    return make
