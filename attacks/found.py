"""What a search tells: where it stands, and what became of the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

STANDS, CLEAN = -1, -2  # in Found.fell_to: never fooled, and misclassified without an attack


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a search stands.

    Attributes:
        stage: name of the running stage. left: units of it that have not ended.
        done: share of the whole search, by expected passes. standing, n: images.
    """

    stage: str
    left: int
    done: float
    standing: int
    n: int


@dataclass(frozen=True, slots=True)
class Found:
    """What became of N images.

    Attributes:
        x_adv: (N, C, H, W) the confirmed example where there is one, else the last iterate of
            the last stage; the image itself where no stage leaves one, and after an interrupted
            search that did not keep them.
        fell_to: (N,) index of the stage that broke the image, STANDS or CLEAN.
        predicted: (N,) the class that the confirmed example is taken for, see `verify`; where
            there is none, that of the clean image.
        stages: their names.
        distance: (N,) float64 norm of the confirmed perturbations, 0 elsewhere.
        violations: claimed examples outside the threat model; none counted.
        forwards, backwards: passes of single images through the network.
        seconds: per stage.
        open: images that stand but have units that did not end, after a time budget.
        prepared: how the network was prepared.
        slots: units in flight.
        sampled: (images that the stages with a share saw, images that they broke), or None.
    """

    x_adv: Tensor
    fell_to: npt.NDArray[np.int16]
    predicted: npt.NDArray[np.int64]
    stages: tuple[str, ...]
    distance: npt.NDArray[np.float64]
    violations: int
    forwards: int
    backwards: int
    seconds: tuple[float, ...]
    open: int
    prepared: str
    slots: int
    sampled: tuple[int, int] | None

    @classmethod
    def joined(cls, parts: Sequence[Found]) -> Found:
        """Searches of one attack over the images one part after the other, as one search."""
        first, sampled = parts[0], [part.sampled for part in parts if part.sampled is not None]
        return cls(
            x_adv=torch.cat([part.x_adv for part in parts]),
            fell_to=np.concatenate([part.fell_to for part in parts]),
            predicted=np.concatenate([part.predicted for part in parts]),
            stages=first.stages,
            distance=np.concatenate([part.distance for part in parts]),
            violations=sum(part.violations for part in parts),
            forwards=sum(part.forwards for part in parts),
            backwards=sum(part.backwards for part in parts),
            seconds=tuple(map(sum, zip(*(part.seconds for part in parts), strict=True))),
            open=sum(part.open for part in parts),
            prepared=first.prepared,
            slots=max(part.slots for part in parts),
            sampled=(sum(seen for seen, _ in sampled), sum(broke for _, broke in sampled))
            if sampled else None,
        )

    @property
    def standing(self) -> npt.NDArray[np.bool_]:
        stands: npt.NDArray[np.bool_] = self.fell_to == STANDS
        return stands
