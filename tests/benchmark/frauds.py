"""Planted frauds, which every evaluation should catch, and sound networks, which it should not.

All on the digits that come with scikit-learn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from robench.attacks.threat import ThreatModel
from robench.benchmark.data import Dataset, load_dataset
from robench.benchmark.models import build_model
from robench.defenses.base import make_defense, take_step

THREAT = ThreatModel("Linf", 0.2)
EPOCHS = 12


@cache
def digits() -> Dataset:
    return load_dataset("digits")


@cache
def sound(defense: str, epochs: int = EPOCHS) -> nn.Module:
    """A small network, trained with Adam."""
    data = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_model("smallcnn", classes=10, channels=1, size=8).train()
        made = make_defense(defense, THREAT, **({} if defense == "standard" else {"steps": 5}))
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(data.train)), 64):
                take_step(made, {"student": net}, [optimizer], data.train.x[rows],
                          data.train.y[rows])
    return net.eval()


class Wrapped(nn.Module):
    """A fraud around a network without any defense."""

    def __init__(self, epochs: int = EPOCHS) -> None:
        super().__init__()
        self.net = sound("standard", epochs)


class Quantized(Wrapped):
    """Rounds its input to nine levels of grey: no gradient anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 8).round() / 8)


class Shattered(Wrapped):
    """Adds a noise of high frequency, a smooth function of the image: useless gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.2 * torch.sin(3000 * x))


class Saturated(Wrapped):
    """Logits as defensive distillation leaves them: softmax underflows."""

    def forward(self, x: Tensor) -> Tensor:
        return 1000 * self.net(x)


class Detached(Wrapped):
    """What decides is hidden from autograd, and a side branch leads astray."""

    def __init__(self, epochs: int = EPOCHS) -> None:
        super().__init__(epochs)
        self.side = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).detach() + 0.01 * self.side(x.flatten(1))


class Stochastic(Wrapped):
    """Noise in the input, drawn anew in every pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.1 * torch.randn_like(x))


class BatchAware(Wrapped):
    """Smooths the images of a batch that is rougher than clean batches are."""

    def forward(self, x: Tensor) -> Tensor:
        rough = (x[..., 1:] - x[..., :-1]).abs().mean()
        smooth = nn.functional.avg_pool2d(x, 3, 1, 1)
        return self.net(torch.where(rough > 0.28, smooth, x))


class Purifying(Wrapped):
    """Climbs the confidence of its own prediction before it answers."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_(True)
            (way,) = torch.autograd.grad(self.net(z).logsumexp(1).sum(), z)
        return self.net(x + 0.02 * way.sign())


class Softmax(Wrapped):
    """Probabilities for logits."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(1)


class InTrainMode(Wrapped):
    """Left in train mode: its batch-norm looks at the batch."""

    def __init__(self, epochs: int = EPOCHS) -> None:
        super().__init__(epochs)
        self.net = copy.deepcopy(self.net).train()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


# name -> (network, threat model, the check that is to find it)
FRAUDS: dict[str, tuple[Callable[..., nn.Module], ThreatModel, str]] = {
    "quantized input": (Quantized, THREAT, "zero-grad"),
    "gradient-shattering noise": (Shattered, THREAT, "unstable"),
    "saturated logits": (Saturated, THREAT, "saturated"),
    "softmax outputs": (Softmax, THREAT, "probabilities"),
    "detached branch": (Detached, THREAT, "grad-vs-fd"),
    "stochastic layer": (Stochastic, THREAT, "random"),
    "recognizes batch statistics": (BatchAware, THREAT, "batch-invariant"),
    "left in train mode": (InTrainMode, THREAT, "eval-mode"),
    "optimizes in its forward pass": (Purifying, THREAT, "dynamic"),
    "eps in the wrong unit: L2:8/255": (
        lambda epochs=EPOCHS: sound("standard", epochs), ThreatModel("L2", 8 / 255), "eps-unit"),
    "eps in the wrong unit: L2:128": (
        lambda epochs=EPOCHS: sound("standard", epochs), ThreatModel("L2", 128.0), "eps-unit"),
}
SOUND = ("standard", "pgd-at", "trades")
