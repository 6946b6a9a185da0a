"""The residual networks for CIFAR-10 of He et al. (2015), section 4.2, with parameter-free shortcuts (option A)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions beside a shortcut that subsamples and pads channels with zeros."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self._stride = stride
        self._padding = (channels_out - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, h, w) -> (N, out, h/stride, w/stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self._stride != 1 or self._padding:
            subsampled = x[:, :, :: self._stride, :: self._stride]
            x = F.pad(subsampled, (0, 0, 0, 0, self._padding, self._padding))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """6k + 2 layers: a convolution, three stages of k blocks with 16, 32, 64 channels, a linear layer.

    Module names follow akamaster/pytorch_resnet_cifar10, whose checkpoints fit.
    """

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> logits (N, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def _stage(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels_in, channels_out, stride)
    return nn.Sequential(first, *(BasicBlock(channels_out, channels_out, 1) for _ in range(blocks - 1)))


def resnet(depth: int) -> CifarResNet:
    """The network of 20, 32, 44, 56 … layers, untrained."""
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"a depth of 6k + 2 was needed, {depth} was given")
    return CifarResNet((depth - 2) // 6)
