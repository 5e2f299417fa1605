"""Standard training: the undefended reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from robench.defenses.base import DEFENSES, Defense, Losses, Nets


@DEFENSES.register("standard", description="cross-entropy on clean images; no defense")
@dataclass(frozen=True, kw_only=True)
class Standard(Defense):
    """min CE(s(x), y). Batch-norm updates: clean."""

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        return x.detach()

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        return Losses({"ce": F.cross_entropy(nets["student"](x), y)})
