"""TrainConfig: how a network is trained, apart from the method; schedules and optimizers."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from torch import nn

ONE_CYCLE_RISE, ONE_CYCLE_FALL = 25.0, 1e4  # torch's div_factor and final_div_factor


class TrainConfig(BaseModel):
    """How a network is trained, apart from the method.

    Points in time (milestones, warmup, swa_start, ema_start) are 0-based epochs, or fractions of
    all epochs if they lie strictly between 0 and 1.

    schedule: "multistep" uses milestones and gamma. "cosine" falls from lr to 0 over all epochs.
    "one-cycle" is torch's OneCycleLR with lr as its highest rate: it rises from lr / 25 over the
    share pct_start of all steps and falls to lr / 250000, both as half a cosine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(ge=1)
    batch_size: int = Field(default=128, ge=2)  # batch-norm cannot use a single image
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)  # the first beta of AdamW
    beta2: float = Field(default=0.999, ge=0, lt=1)  # of AdamW
    nesterov: bool = False
    weight_decay: float = Field(default=5e-4, ge=0)  # on every parameter, as all sources do
    clip: float | None = Field(default=None, gt=0)  # the largest length of a network's gradient
    precision: Literal["fp32", "bf16"] = "fp32"
    schedule: Literal["multistep", "cosine", "one-cycle"] = "multistep"
    milestones: tuple[float, ...] = ()  # lr is multiplied by gamma from these epochs on
    gamma: float = Field(default=0.1, gt=0, le=1)
    pct_start: float = Field(default=0.3, gt=0, lt=1)
    warmup: float = Field(default=0, ge=0)  # until then lr is multiplied by a ramp from 0 to 1
    lr_per_iteration: bool = False  # look the lr up at epoch + (i + 1) / n instead of epoch
    swa_start: float | None = Field(default=None, ge=0)
    ema: float | None = Field(default=None, gt=0, lt=1)  # decay of the moving average, per step
    ema_start: float = Field(default=0, ge=0)
    validation: int = Field(default=0, ge=0)  # training images held out
    select: Literal["val", "test", "last"] = "val"
    select_steps: int = Field(default=10, ge=1)  # PGD steps of the selection attack
    select_step_size: float | None = None  # None: eps / 4
    select_every: int = Field(default=1, ge=1)
    select_dense_from: int = Field(default=0, ge=0)  # from here on select in every epoch

    @field_validator("nesterov")
    @classmethod
    def _needs_momentum(cls, value: bool, info: ValidationInfo) -> bool:
        if value and not (info.data.get("optimizer") == "sgd" and info.data.get("momentum")):
            raise ValueError("needs optimizer sgd and a momentum above 0")
        return value

    def moment(self, point: float) -> float:
        """A point in time in epochs."""
        return point * self.epochs if 0 < point < 1 else point

    def lr_at(self, time: float, steps: int = 1) -> float:
        """The learning rate `time` epochs into the training, without the warm-up.

        steps: of an epoch; one-cycle starts at the end of the first one, as torch's does.
        """
        if self.schedule == "one-cycle":
            return self._one_cycle(max(time * steps - 1, 0), self.epochs * steps)
        if self.schedule == "cosine":
            return _half_cosine(self.lr, 0, time / self.epochs)
        return self.lr * self.gamma ** sum(time >= self.moment(m) for m in self.milestones)

    def lr_of(self, epoch: int, step: int, steps: int) -> float:
        """The learning rate of step `step` of `steps` in an epoch, from 0.

        One-cycle and the ramp of the warm-up move in every step, whatever lr_per_iteration says.
        """
        end, warmup = epoch + (step + 1) / steps, self.moment(self.warmup)
        each = self.lr_per_iteration or self.schedule == "one-cycle"
        lr = self.lr_at(end if each else epoch, steps)
        return lr * end / warmup if end < warmup else lr

    def _one_cycle(self, step: float, total: int) -> float:
        low, turn = self.lr / ONE_CYCLE_RISE, self.pct_start * total - 1
        if step < turn:
            return _half_cosine(low, self.lr, step / turn)
        return _half_cosine(self.lr, low / ONE_CYCLE_FALL, (step - turn) / (total - 1 - turn))

    @property
    def starts(self) -> dict[str, int]:
        """The averages of weights that are wanted, "swa" and "ema", and their first epochs."""
        wanted = {"swa": self.swa_start, "ema": self.ema_start if self.ema is not None else None}
        return {name: int(self.moment(at)) for name, at in wanted.items() if at is not None}

    def averages(self, epoch: int, name: str = "swa") -> bool:
        """Whether an average takes in this epoch."""
        return epoch >= self.starts.get(name, self.epochs)

    def measures(self, epoch: int) -> bool:
        """Whether this epoch takes part in the selection; the last one always does."""
        last = epoch == self.epochs - 1
        dense = epoch >= self.select_dense_from
        return last or dense or epoch % self.select_every == 0

    @property
    def ranked(self) -> tuple[str, ...]:
        """The checkpoints that are rows of the leaderboard."""
        return self._last if self.select == "last" else ("best", *self.starts)

    @property
    def unranked(self) -> tuple[str, ...]:
        """The student's other checkpoints."""
        return () if self.select == "last" else self._last

    @property
    def _last(self) -> tuple[str, ...]:
        return ("last", *(f"{name}-last" for name in self.starts))


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def make_optimizer(config: TrainConfig, net: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all parameters of one network.

    On a GPU torch steps over all of them at once (foreach). Fused kernels would save nothing that
    shows beside the ascent, and change weights behind the back of `_version`, which views read.
    """
    if config.optimizer == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=config.weight_decay,
                                 betas=(config.momentum, config.beta2))
    return torch.optim.SGD(net.parameters(), lr=config.lr, momentum=config.momentum,
                           weight_decay=config.weight_decay, nesterov=config.nesterov)
