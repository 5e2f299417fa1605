"""MobileNetV2 for small images: height and width are divided by 8, not by 32.

Against the ImageNet network of the paper (Sandler et al. 2018, arXiv 1801.04381), the stem and
the second stage keep their resolution, plain ReLU replaces ReLU6, and blocks which keep the
resolution but change the width have a shortcut too (a 1x1 convolution). The adversarial
distillation literature (RSLAD, AdaAD, PeerAiD) means this network; its parameter names are kept.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from robench.benchmark.models.build import MODELS

# expansion, outputs, blocks, stride of the first block: table 2 of the paper, but for the
# stride of the second row (there 2).
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 expand, 3x3 depthwise, 1x1 project without activation; a shortcut unless it strides."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * inputs
        self.conv1 = nn.Conv2d(inputs, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.residual = stride == 1
        self.shortcut = nn.Sequential()  # empty: the identity
        if self.residual and inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:  # (N, inputs, H, W) -> (N, outputs, H', W')
        out: Tensor = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.residual:
            out = out + self.shortcut(x)
        return out


@MODELS.register(
    "mobilenetv2",
    description="MobileNetV2 with the CIFAR stem",
    paper="Sandler et al. 2018, arXiv 1801.04381",
)
def mobilenetv2(classes: int, channels: int) -> nn.Sequential:
    layers = nn.Sequential()
    inputs = 32
    for expansion, outputs, blocks, stride in STAGES:
        for index in range(blocks):
            layers.append(
                InvertedResidual(inputs, outputs, expansion, stride if index == 0 else 1)
            )
            inputs = outputs
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 32, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(32),
            relu1=nn.ReLU(),
            layers=layers,
            conv2=nn.Conv2d(inputs, 1280, 1, bias=False),
            bn2=nn.BatchNorm2d(1280),
            relu2=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(1280, classes),
        )
    )
