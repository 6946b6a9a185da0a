"""ResNet-18 for images of 32 or 64 pixels a side."""

from __future__ import annotations

from torch import nn


def resnet18(classes: int) -> nn.Module:
    """(N, 3, h, w) -> logits (N, classes), untrained.

    Torchvision's network with a stem of 3 × 3 without stride and without max-pooling, as is usual for CIFAR-10 and
    Tiny ImageNet: stages of 64, 128, 256 and 512 channels at h, h/2, h/4 and h/8.

    Reference: He et al., 2015; the stem of its section 4.2.
    """
    from torchvision.models import resnet18 as of_imagenet

    network: nn.Module = of_imagenet(weights=None, num_classes=classes)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    network.maxpool = nn.Identity()
    return network
