"""Products with the Gauss-Newton matrix of the whole network, without forming it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsekit.curvature.attention import plain_attention
from sparsekit.problem.objective import Objective, as_found, some


class GaussNewton:
    """v ↦ F v with F = (1/N) Σ_n J_nᵀ Λ_n J_n over all the space's weights, cross-layer parts included.

    One forward-mode and one reverse-mode pass for each batch and vector; where a function has no forward mode, two of
    reverse mode stand in for the first. For likelihoods of the exponential family with natural parameters this is the
    Fisher information.

    Reference: Schraudolph, 2002.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def __matmul__(self, V: Tensor) -> Tensor:
        """F V for V (n,) or (n, k)."""
        columns = V[:, None] if V.dim() == 1 else V
        total = torch.zeros_like(columns)
        count = 0
        model, space = self.objective.model, self.objective.space
        with as_found(model), plain_attention():
            named = {name: p.detach() for name, p in model.named_parameters()}
            primals = {name: named[name] for name in space.names}
            rest = {name: p for name, p in named.items() if name not in primals} | dict(model.named_buffers())
            for inputs, targets, weight in self.objective.weighted():

                def forward(values: dict[str, Tensor], inputs: Tensor = inputs) -> Tensor:
                    return torch.func.functional_call(model, (values, rest), (inputs,))

                # not torch.func.vjp, which fails on attention under autocast
                leaves = {name: p.detach().requires_grad_() for name, p in primals.items()}
                with torch.enable_grad():
                    output = forward(leaves)
                for k in range(columns.shape[1]):
                    tangent = space.unflatten(columns[:, k].contiguous())
                    vector = self._output_curvature(output, targets, _pushed(forward, primals, tangent)) * weight
                    gradients = torch.autograd.grad(
                        output, list(leaves.values()), vector, retain_graph=True, materialize_grads=True
                    )
                    total[:, k] += space.flatten(dict(zip(leaves, gradients, strict=True)))
                count += len(output)
        return (total / some(count)).view_as(V)

    def _output_curvature(self, output: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        """The Hessian of each example's loss in the outputs, times its tangent."""
        likelihood = self.objective.likelihood
        return likelihood.root_scale(output, targets) ** 2 * likelihood.curvature(output, tangent)


def _pushed(
    forward: Callable[[dict[str, Tensor]], Tensor], primals: dict[str, Tensor], tangent: dict[str, Tensor]
) -> Tensor:
    """J tangent, J the outputs' Jacobian at the primals."""
    pushed: Tensor
    try:
        _, pushed = torch.func.jvp(forward, (primals,), (tangent,))  # type: ignore[misc]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # no forward mode, such as batch norm's between types of number under autocast

        def of_values(*values: Tensor) -> Tensor:
            return forward(dict(zip(primals, values, strict=True)))

        vectors = tuple(tangent[name] for name in primals)
        _, pushed = torch.autograd.functional.jvp(of_values, tuple(primals.values()), vectors)
    return pushed
