"""VGG11 without batch normalisation, for images of 32 pixels a side."""

from __future__ import annotations

from torch import nn


def vgg11(classes: int) -> nn.Module:
    """(N, 3, 32, 32) -> logits (N, classes), untrained: torchvision's convolutions and one linear layer of 512 inputs.

    9.2 million parameters for ten classes.

    Reference: Simonyan and Zisserman, 2014 (configuration A); one linear layer in place of three is usual for CIFAR-10.
    """
    from torchvision.models import vgg11 as of_imagenet

    network: nn.Module = of_imagenet(weights=None, num_classes=classes)
    network.avgpool = nn.Identity()
    network.classifier = nn.Linear(512, classes)
    nn.init.normal_(network.classifier.weight, 0, 0.01)  # as torchvision does
    nn.init.zeros_(network.classifier.bias)
    return network
