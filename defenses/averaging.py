"""Averages of a network's weights along its training: SWA and EMA."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Average(ABC):
    """An average of weights; `fit` measures, keeps and restores all of them alike."""

    every_step: ClassVar[bool]  # updated after each step, or at the end of each epoch

    @abstractmethod
    def update(self, net: nn.Module) -> None:
        """Take in the present weights of `net`."""

    @abstractmethod
    def network(self, net: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
        """The averaged network, fit for use now.

        net: as in `update`. batches: clean images (N, C, H, W), augmented as in training.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class WeightAverage(Average):
    """SWA: the uniform mean of a network's parameters over epoch ends (Izmailov et al. 2018).

    Buffers are not averaged: batch-norm statistics belong to the weights they were measured
    with, so `network` measures them anew, as PeerAiD and KD & SWA (Chen et al. 2021) do.
    """

    every_step = False

    def __init__(self) -> None:
        self.count = 0
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Add the present parameters: mean <- mean + (theta - mean) / (count + 1)."""
        self.count += 1
        for name, p in net.named_parameters():
            if name not in self.mean:
                self.mean[name] = p.detach().clone()
            else:
                self.mean[name].lerp_(p.detach(), 1 / self.count)

    def network(self, net: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
        """A copy of `net` with the mean weights and the statistics of these clean batches."""
        averaged = copy.deepcopy(net)
        with torch.no_grad():
            for name, p in averaged.named_parameters():
                p.copy_(self.mean[name])
        reestimate_batch_norm(averaged, batches)
        return averaged

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean = state["count"], state["mean"]


class MovingAverage(Average):
    """EMA: an exponential moving average over steps, of parameters and of batch-norm statistics.

    The first update copies the network; then average <- decay average + (1 - decay) net.
    """

    every_step = True

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay, self.begun = decay, False
        self.average = copy.deepcopy(net).eval().requires_grad_(False)

    def update(self, net: nn.Module) -> None:
        ema_update(self.average, net, self.decay if self.begun else 0.0)
        self.begun = True

    def network(self, net: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
        return self.average

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self.begun, "average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begun = state["begun"]
        self.average.load_state_dict(state["average"])


@torch.no_grad()
def ema_update(average: nn.Module, net: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) net, buffers too; whole numbers are copied."""
    for of in (nn.Module.parameters, nn.Module.buffers):  # tied weights come once
        for old, new in zip(of(average), of(net), strict=True):
            if old.is_floating_point():
                old.lerp_(new, 1 - decay)
            else:
                old.copy_(new)


@torch.no_grad()
def reestimate_batch_norm(net: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace running statistics by their exact mean over `batches` of images (N, C, H, W).

    Only batch-norm layers are in train mode meanwhile; every mode and momentum is restored.
    """
    layers = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
              and m.track_running_stats]
    if not layers:
        return
    modes = {module: module.training for module in net.modules()}
    momenta = [layer.momentum for layer in layers]
    net.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    seen = 0
    for x in batches:
        seen += len(x)
        for layer in layers:
            layer.momentum = len(x) / seen  # the first batch replaces the reset values
        net(x)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    for module, training in modes.items():
        module.training = training
