"""ResNet-18 with pre-activation blocks, for images of 32 pixels a side."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d


class PreActivationBlock(nn.Module):
    """x ↦ shortcut + conv(relu(bn(conv(relu(bn(x)))))); a shortcut with a convolution begins after the first ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        hidden: Tensor = self.conv2(torch.relu(self.bn2(self.conv1(active))))
        return hidden + shortcut


class PreActivationResNet18(nn.Module):
    """(N, 3, 32, 32) -> logits (N, classes): four stages of two blocks with 64, 128, 256 and 512 channels.

    Reference: He et al., 2016 ("Identity mappings in deep residual networks").
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        blocks, width = [], 64
        for outputs, first in ((64, 1), (128, 2), (256, 2), (512, 2)):
            for stride in (first, 1):
                blocks.append(PreActivationBlock(width, outputs, stride))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.bn(self.blocks(self.conv1(x))))
        logits: Tensor = self.linear(avg_pool2d(features, 4).flatten(1))
        return logits


def preact_resnet18(classes: int) -> nn.Module:
    """`PreActivationResNet18`, untrained; 11.2 million parameters for ten classes."""
    return PreActivationResNet18(classes)
