"""The deep autoencoder of Hinton and Salakhutdinov (2006), with rectified units."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class Autoencoder(nn.Module):
    """An encoder and a decoder of linear layers with ReLU between them, none at the code and at the output.

    Args:
        widths: from the input to the code; the decoder has them in reverse.
    """

    def __init__(self, widths: Sequence[int] = (784, 1000, 500, 250, 30)) -> None:
        super().__init__()
        self.encoder = _rectified(widths)
        self.decoder = _rectified(widths[::-1])

    def forward(self, x: Tensor) -> Tensor:
        """(N, widths[0]) -> logits of the same shape."""
        logits: Tensor = self.decoder(self.encoder(x))
        return logits


def _rectified(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        linear = nn.Linear(inputs, outputs)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")  # keeps the signal's size through eight layers
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
