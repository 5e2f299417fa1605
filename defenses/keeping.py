"""What survives a training: its networks, and the state from which it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from robench.defenses.averaging import Average
from robench.defenses.config import TrainConfig
from robench.defenses.history import STUDENT, EpochLog, is_best
from robench.errors import UsageError, one_line


class Keeper(Protocol):
    """Where a training run keeps what must survive it."""

    def load_state(self) -> dict[str, Any] | None: ...
    def save_state(self, state: dict[str, Any]) -> None: ...
    def save_network(self, name: str, net: nn.Module, epoch: int) -> None: ...


@dataclass
class UnderWay:
    """An epoch that was interrupted after a step.

    Attributes:
        seen: what each of its steps so far saw: the parts of the loss, () each.
        seconds: that these steps took.
        generators: from `randomness.generators`, after them; [] before the first step.
    """

    seen: list[dict[str, Tensor]] = field(default_factory=list)
    seconds: float = 0.0
    generators: list[Tensor] = field(default_factory=list)


@dataclass
class Progress:
    """All that changes in a training. Epochs are seeded by number, and between two of them no
    generator is kept.

    Attributes:
        nets: the trained networks.
        optimizers: one for each of `nets`.
        memory: what the defense remembers.
        averages: "swa" and "ema", those that are wanted.
        history: one log for each epoch that is over.
        under_way: of the next one, where it has begun.
    """

    nets: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    memory: dict[str, nn.Module]
    averages: dict[str, Average]
    history: list[EpochLog] = field(default_factory=list)
    under_way: UnderWay = field(default_factory=UnderWay)

    @property
    def epoch(self) -> int:
        """The next one."""
        return len(self.history)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            group: {name: part.state_dict() for name, part in parts.items()}
            for group, parts in self._parts().items()
        }
        return state | {"history": [asdict(log) for log in self.history],
                        "under_way": vars(self.under_way)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UsageError for a state of another version of robench."""
        groups = self._parts()
        if state.keys() != groups.keys() | {"history", "under_way"}:
            raise UsageError("the unfinished training is of another version of robench: delete "
                             "its state.pt to train again")
        try:
            for group, parts in groups.items():
                for name, part in parts.items():
                    part.load_state_dict(state[group][name])
            for optimizer in self.optimizers.values():
                for kept in optimizer.state.values():
                    if "step" in kept:  # on a GPU torch would wait for it, once per parameter
                        kept["step"] = kept["step"].cpu()
            self.history[:] = [EpochLog(**log) for log in state["history"]]
            self.under_way = UnderWay(**state["under_way"])
        except Exception as error:  # the names are right, what they hold is not
            raise UsageError("the unfinished training does not fit its spec: delete its state.pt "
                             f"to train again ({one_line(error, 120)})") from None

    def _parts(self) -> dict[str, Mapping[str, Any]]:
        return {"nets": self.nets, "optimizers": self.optimizers, "memory": self.memory,
                "averages": self.averages}


def keep_networks(
    keeper: Keeper, progress: Progress, averaged: Mapping[str, nn.Module], config: TrainConfig
) -> None:
    """Hand over the networks that the epoch just over made best or last.

    averaged: the networks of the averages that have begun.
    """
    history, epoch = progress.history, progress.epoch - 1
    student = progress.nets[STUDENT]
    partners = {name: net for name, net in progress.nets.items() if net is not student}
    kept: dict[str, nn.Module] = {}
    if is_best(history):
        kept |= {"best": student, **partners}  # the partners of the best student
    kept |= {name: net for name, net in averaged.items() if is_best(history, name)}
    if progress.epoch == config.epochs:
        kept |= {"last": student, **{f"{name}-last": net for name, net in averaged.items()}}
        if config.select == "last":
            kept |= partners
    for name, net in kept.items():
        keeper.save_network(name, net, epoch)
