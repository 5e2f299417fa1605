"""A small classifier of handwritten digits, as a project of your own would have it."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("weights.safetensors")


def build() -> nn.Sequential:
    """Images (N, 1, 8, 8) in [0, 1] to logits (N, 10)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


def trained() -> nn.Sequential:
    """The network that ships. `robench eval net:trained` attacks it."""
    net = build()
    net.load_state_dict(load_file(WEIGHTS))
    return net


def held_out(n: int) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 8, 8) in [0, 1] and labels (n,) that the network was not trained on."""
    from robench.benchmark.data import load_dataset

    test = load_dataset("digits").test.take(n)
    return test.x, test.y
