"""Wide residual networks (Zagoruyko and Komodakis 2016, arXiv 1605.07146).

Parameter names are those of TRADES' released checkpoints (block1.layer.0.convShortcut, fc).
Their dead `sub_block1`, which no forward pass uses, is left out.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from robench.benchmark.models.build import MODELS
from robench.benchmark.models.resnet import conv3x3

PAPER = "Zagoruyko and Komodakis 2016, arXiv 1605.07146"


class WideBlock(nn.Module):
    """bn-relu-conv3x3 twice. Where the width changes, a 1x1 convolution is the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.convShortcut: nn.Conv2d | None = None
        if inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, inputs, H, W) -> (N, outputs, H', W')
        active = F.relu(self.bn1(x))
        shortcut: Tensor = x if self.convShortcut is None else self.convShortcut(active)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return shortcut + out


def stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """The first block changes width and resolution, the others keep both."""
    rest = [WideBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(
        OrderedDict(layer=nn.Sequential(WideBlock(inputs, outputs, stride), *rest))
    )


def wide_resnet(depth: int, factor: int, classes: int, channels: int) -> nn.Sequential:
    """WRN-depth-factor for images of any size; depth is 4 more than a multiple of 6."""
    blocks = (depth - 4) // 6  # three stages of blocks with two convolutions each
    widths = (16, 16 * factor, 32 * factor, 64 * factor)
    groups = {
        f"block{number}": stage(blocks, inputs, outputs, stride=1 if number == 1 else 2)
        for number, (inputs, outputs) in enumerate(pairwise(widths), start=1)
    }
    network = nn.Sequential(
        OrderedDict(
            conv1=conv3x3(channels, widths[0]),
            **groups,
            bn1=nn.BatchNorm2d(widths[-1]),
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(widths[-1], classes),
        )
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return network


@MODELS.register("wrn-28-10", description="WideResNet-28-10, pre-activation", paper=PAPER)
def wrn_28_10(classes: int, channels: int) -> nn.Sequential:
    return wide_resnet(28, 10, classes, channels)


@MODELS.register("wrn-34-10", description="WideResNet-34-10, pre-activation", paper=PAPER)
def wrn_34_10(classes: int, channels: int) -> nn.Sequential:
    return wide_resnet(34, 10, classes, channels)
