"""Products with the Fisher matrix: of each tensor's own block, or of the whole network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsekit import CurvatureError, FisherKind, Objective
from sparsekit.curvature import GaussNewton, layer_gradients

#: V (n, k) ↦ F V, by the examples of one batch or of all held-out ones.
FisherProduct = Callable[[Tensor], Tensor]


def layer_product(objective: Objective, fisher: FisherKind, generator: torch.Generator) -> FisherProduct:
    """V (n, k) ↦ F V, F cut to one block a tensor: one forward and backward pass for all columns."""
    space = objective.space

    def product(V: Tensor) -> Tensor:
        total = torch.zeros_like(V)
        for gradients in layer_gradients(objective, fisher, generator=generator):
            for name, one in gradients.items():
                total[space[name].slice] += one.product(V[space[name].slice])
        return total.div_(objective.count())

    return product


def network_product(objective: Objective) -> FisherProduct:
    """V (n, k) ↦ F V, F of the whole network.

    Raises:
        CurvatureError: F V is not finite although V is.
    """

    def product(V: Tensor) -> Tensor:
        # F is linear: at unit scale a fit that runs away cannot be mistaken for a network that overflows.
        scale = V.abs().amax().clamp_min(torch.finfo(V.dtype).tiny)
        image = GaussNewton(objective) @ (V / scale)
        if bool(scale.isfinite()) and not bool(image.isfinite().all()):
            raise CurvatureError(
                "Gauss-Newton products of the network are not finite; check the data, the loss and the weights"
            )
        return scale * image

    return product
