"""What a finished training leaves in its done.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from robench.defenses.history import STUDENT, EpochLog, catastrophic_epoch, robust_overfitting


@dataclass(frozen=True)
class Result:
    """A finished training. `devices` trained it together; `created` says when it ended (UTC, ISO
    8601), "" if an older version did it."""

    seconds: float
    history: list[EpochLog] = field(default_factory=list)
    devices: int = 1
    created: str = ""

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Self:
        """Of the fields as JSON. Raises anything if they are damaged."""
        return cls(float(content["seconds"]), [EpochLog.read(log) for log in content["history"]],
                   int(content.get("devices", 1)), str(content.get("created", "")))

    def overfitting(self, checkpoint: str) -> dict[str, Any]:
        """The facts of a record on the network behind a checkpoint; None for partners."""
        of = STUDENT if checkpoint in ("best", "last") else checkpoint.removesuffix("-last")
        return {
            "robust_overfitting": robust_overfitting(self.history, of),
            "catastrophic_epoch": catastrophic_epoch(self.history) if of == STUDENT else None,
        }
