"""Planted frauds, which every evaluation should catch, and sound networks, which it should not."""

from __future__ import annotations

import copy
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
    """A fraud around a network without any defense, made for clean images (N, C, H, W) and eps."""

    def __init__(self, net: nn.Module, images: Tensor, eps: float) -> None:
        super().__init__()
        self.net, self.eps = net, eps


class Quantized(Wrapped):
    """Rounds its input to nine levels of grey: no gradient anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 8).round() / 8)


class Shattered(Wrapped):
    """Adds a noise of high frequency, a smooth function of the image: useless gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.eps * torch.sin(3000 * x))


class Saturated(Wrapped):
    """Logits as defensive distillation leaves them: softmax underflows."""

    def forward(self, x: Tensor) -> Tensor:
        return 1000 * self.net(x)


class Detached(Wrapped):
    """What decides is hidden from autograd, and a side branch leads astray."""

    def __init__(self, net: nn.Module, images: Tensor, eps: float) -> None:
        super().__init__(net, images, eps)
        self.side = nn.Linear(images[0].numel(), 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).detach() + 0.01 * self.side(x.flatten(1))


class Stochastic(Wrapped):
    """Noise in the input, drawn anew in every pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.eps / 2 * torch.randn_like(x))


class BatchAware(Wrapped):
    """Smooths the images of a batch that is rougher than clean batches are."""

    def __init__(self, net: nn.Module, images: Tensor, eps: float) -> None:
        super().__init__(net, images, eps)
        self.limit = 1.05 * self.rough(images)

    @staticmethod
    def rough(x: Tensor) -> Tensor:
        return (x[..., 1:] - x[..., :-1]).abs().mean()

    def forward(self, x: Tensor) -> Tensor:
        smooth = nn.functional.avg_pool2d(x, 3, 1, 1)
        return self.net(torch.where(self.rough(x) > self.limit, smooth, x))


class Purifying(Wrapped):
    """Climbs the confidence of its own prediction before it answers."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_(True)
            (way,) = torch.autograd.grad(self.net(z).logsumexp(1).sum(), z)
        return self.net(x + self.eps / 10 * way.sign())


class Softmax(Wrapped):
    """Probabilities for logits."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(1)


class InTrainMode(Wrapped):
    """Left in train mode: its batch-norm looks at the batch."""

    def __init__(self, net: nn.Module, images: Tensor, eps: float) -> None:
        super().__init__(copy.deepcopy(net).train(), images, eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Innocent(Wrapped):
    """The network as it is: here the threat model is the fraud."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


# name -> (the fraud, the check that is to find it)
FRAUDS: dict[str, tuple[type[Wrapped], str]] = {
    "quantized input": (Quantized, "zero-grad"),
    "gradient-shattering noise": (Shattered, "unstable"),
    "saturated logits": (Saturated, "saturated"),
    "softmax outputs": (Softmax, "probabilities"),
    "detached branch": (Detached, "grad-vs-fd"),
    "stochastic layer": (Stochastic, "random"),
    "recognizes batch statistics": (BatchAware, "batch-invariant"),
    "left in train mode": (InTrainMode, "eval-mode"),
    "optimizes in its forward pass": (Purifying, "dynamic"),
    "eps in the wrong unit: L2:8/255": (Innocent, "eps-unit"),
    "eps in the wrong unit: L2:128": (Innocent, "eps-unit"),
}
SOUND = ("standard", "pgd-at", "trades")


def plant(
    name: str, net: nn.Module, images: Tensor, threat: ThreatModel
) -> tuple[nn.Module, ThreatModel, str]:
    """The fraud in a network, the threat model that it claims, and the check that finds it."""
    fraud, check = FRAUDS[name]
    _, unit, wrong = name.partition("unit: ")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = fraud(net, images, threat.eps)
    return made, ThreatModel.parse(wrong) if unit else threat, check
