"""A training that ran out of memory: how large may its batches be?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from robench.attacks.memory import Batches
from robench.attacks.threat import ThreatModel
from robench.benchmark.spec import CellSpec
from robench.defenses.base import Defense
from robench.defenses.feed import Pixels
from robench.defenses.trainer import Watcher, fit
from robench.errors import RobenchError


class _Enough(Exception):
    """The step that was to be tried is over."""


class _OneStep(Watcher):
    def step(self, epoch: int, step: int, steps: int) -> None:
        raise _Enough


class _Nowhere:
    """A keeper that keeps nothing."""

    def load_state(self) -> dict[str, Any] | None:
        return None

    def save_state(self, state: dict[str, Any]) -> None: ...
    def save_network(self, name: str, net: nn.Module, epoch: int) -> None: ...


def advice(
    spec: CellSpec, defense: Defense, networks: Callable[[], Mapping[str, nn.Module]],
    data: tuple[Pixels, Tensor],
) -> str:
    """What to do about it, in a sentence: the largest half, quarter, ... of the batch size with
    which a step of the training succeeds on new `networks`.

    data: the training images (N, C, H, W) and labels (N,), on the device.
    """
    batches = Batches(max(2, spec.train.batch_size // 2))
    try:
        while batches.size > 1:
            with batches.fitted():
                config = spec.train.model_copy(update={"batch_size": batches.size})
                fit(defense, dict(networks()), data, config, watcher=_OneStep(),
                    threat=ThreatModel.parse(spec.threat), keeper=_Nowhere(), seed=spec.seed)
    except _Enough:
        return f"batches of {batches.size} fit: --set batch_size={batches.size}"
    except RobenchError:
        pass  # not even one
    return "not even batches of two images fit: take a device with more, or a smaller network"
