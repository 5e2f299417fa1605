"""A third-party package in one file: an attack and a defense that robench finds by itself.

Its pyproject.toml would say:

    [project.entry-points."robench.attacks"]
    sample = "robench_sample"

    [project.entry-points."robench.defenses"]
    sample = "robench_sample"
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robench.attacks import ATTACKS, Classifier, ThreatModel, frozen
from robench.defenses import DEFENSES, Defense, Losses, Nets


@ATTACKS.register("sample-noise", description="the first of many random images that fools")
@dataclass(frozen=True)
class Noise:
    threat: ThreatModel
    tries: int = 100

    def __call__(self, model: Classifier, x: Tensor, y: Tensor) -> Tensor:
        result = x.detach().clone()
        with frozen(model), torch.no_grad():
            for _ in range(self.tries):
                sound = model(result).argmax(1) == y
                result[sound] = self.threat.sample(x)[sound]
        return result


@DEFENSES.register("sample-smooth", description="standard training with label smoothing")
@dataclass(frozen=True, kw_only=True)
class Smooth(Defense):
    smoothing: float = 0.1

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        return x.detach()

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        logits = nets["student"](x_adv)
        return Losses({"ce": F.cross_entropy(logits, y, label_smoothing=self.smoothing)})
