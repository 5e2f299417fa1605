"""Residual networks with the CIFAR stem: a 3x3 convolution of stride 1, no max-pooling.

Parameter names are those of the checkpoints that the robustness literature releases
(conv1, bn1, layer1.0.conv1, layer1.0.shortcut.0, linear), so that these load as they are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from robench.benchmark.models.build import MODELS


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Batch-norm follows every convolution here, or has already come; neither needs a bias."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Post-activation: relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))) (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()  # empty: the identity
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:  # (N, inputs, H, W) -> (N, outputs, H', W')
        out: Tensor = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class PreActBlock(nn.Module):
    """Pre-activation: shortcut + conv(relu(bn(conv(relu(bn(x)))))) (He et al. 2016).

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input, without
    batch-norm; elsewhere it is x itself.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:  # (N, inputs, H, W) -> (N, outputs, H', W')
        active = F.relu(self.bn1(x))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return shortcut + out


def stages(
    block: type[BasicBlock] | type[PreActBlock], widths: Sequence[int], blocks: int
) -> OrderedDict[str, nn.Module]:
    """layer1, layer2, ...: `blocks` blocks each. All but the first halve height and width."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (inputs, outputs) in enumerate(pairwise([widths[0], *widths]), start=1):
        first = block(inputs, outputs, stride=1 if number == 1 else 2)
        rest = [block(outputs, outputs, stride=1) for _ in range(blocks - 1)]
        layers[f"layer{number}"] = nn.Sequential(first, *rest)
    return layers


def resnet(widths: Sequence[int], blocks: int, classes: int, channels: int) -> nn.Sequential:
    """A post-activation network for images of any size."""
    return nn.Sequential(
        OrderedDict(
            conv1=conv3x3(channels, widths[0]),
            bn1=nn.BatchNorm2d(widths[0]),
            relu=nn.ReLU(),
            **stages(BasicBlock, widths, blocks),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(widths[-1], classes),
        )
    )


@MODELS.register(
    "small-resnet",
    description="post-activation ResNet-8, 16-32-64 channels: 32x32 images on the CPU",
    paper="He et al. 2015, arXiv 1512.03385, section 4.2, with one block per stage",
)
def small_resnet(classes: int, channels: int) -> nn.Sequential:
    return resnet((16, 32, 64), 1, classes, channels)


@MODELS.register(
    "resnet18",
    description="post-activation ResNet-18 with the CIFAR stem",
    paper="He et al. 2015, arXiv 1512.03385",
)
def resnet18(classes: int, channels: int) -> nn.Sequential:
    return resnet((64, 128, 256, 512), 2, classes, channels)


@MODELS.register(
    "preactresnet18",
    description="pre-activation ResNet-18 with the CIFAR stem and a final batch-norm",
    paper="He et al. 2016, arXiv 1603.05027",
)
def preactresnet18(classes: int, channels: int) -> nn.Sequential:
    """As in Rice et al. 2020 and AWP. Variants without the final batch-norm `bn` exist."""
    widths = (64, 128, 256, 512)
    return nn.Sequential(
        OrderedDict(
            conv1=conv3x3(channels, widths[0]),
            **stages(PreActBlock, widths, 2),
            bn=nn.BatchNorm2d(widths[-1]),
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(widths[-1], classes),
        )
    )
