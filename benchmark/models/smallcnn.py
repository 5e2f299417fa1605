"""A small convolutional network, for quick experiments without a GPU."""

from __future__ import annotations

from torch import nn

from robench.benchmark.models.build import MODELS
from robench.benchmark.models.resnet import conv3x3


@MODELS.register(
    "smallcnn",
    description="three convolutions and a linear layer: 8x8 to 32x32 images on the CPU",
)
def smallcnn(classes: int, channels: int, size: int) -> nn.Sequential:
    """conv-BN-ReLU with 16, 32 and 32 channels, then a linear layer on the flattened map.

    The map is not averaged, because where a stroke lies tells digits apart.
    """
    # Images of more than 16 pixels are halved by the stem, too; it would dominate the time.
    strides = (1 if size <= 16 else 2, 2, 1)
    layers = nn.Sequential()
    inputs = channels
    for outputs, stride in zip((16, 32, 32), strides, strict=True):
        layers.extend([conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU()])
        inputs = outputs
        size = (size + stride - 1) // stride
    layers.extend([nn.Flatten(), nn.Linear(inputs * size * size, classes)])
    return layers
