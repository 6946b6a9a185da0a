"""LeNet-5, LeNet-300-100 and a perceptron of the latter's size, in the sizes that are pruned in the literature."""

from __future__ import annotations

from typing import Literal

from torch import nn

Architecture = Literal["lenet5", "lenet-300-100", "mlp-300-100-tanh"]


def lenet(architecture: Architecture) -> nn.Sequential:
    """(N, 1, 28, 28) -> logits (N, 10), untrained.

    `lenet5`: two convolutions of 5 × 5 with 20 and 50 channels, each with max-pooling by two, and linear layers of 500
    and 10 (431,080 parameters, Caffe's, rectified after the first linear layer only). `lenet-300-100`: linear layers
    of 300, 100 and 10, rectified (266,610 parameters). `mlp-300-100-tanh`: the same with hyperbolic tangents.

    Reference: LeCun et al., 1998; Han et al., 2015; Laurent et al., 2020 (the last).
    """
    if architecture == "lenet5":
        return nn.Sequential(
            nn.Conv2d(1, 20, 5),
            nn.MaxPool2d(2),
            nn.Conv2d(20, 50, 5),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(800, 500),
            nn.ReLU(),
            nn.Linear(500, 10),
        )
    activation = nn.Tanh if architecture == "mlp-300-100-tanh" else nn.ReLU
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 300),
        activation(),
        nn.Linear(300, 100),
        activation(),
        nn.Linear(100, 10),
    )
