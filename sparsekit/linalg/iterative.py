"""Preconditioned conjugate gradients with a stated stopping rule and a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConjugateGradients:
    """How a solve went.

    Attributes:
        solution: (n,).
        iterations: products with A that were taken.
        residual: ‖b − A x‖ / ‖b‖ in the preconditioner's norm, as the recursion carries it.
        converged: whether `residual` fell to the tolerance.
    """

    solution: Tensor
    iterations: int
    residual: float
    converged: bool


@torch.no_grad()
def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    preconditioner: Callable[[Tensor], Tensor],
    start: Tensor | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 500,
) -> ConjugateGradients:
    """Solve A x = b for symmetric positive definite A.

    Stops when √(rᵀM⁻¹r) ≤ tolerance · √(bᵀM⁻¹b), with r = b − A x and the preconditioner M⁻¹; the norm of
    M⁻¹ rather than the plain one, because the scales of weights in a network differ by orders of magnitude.
    ½xᵀAx − bᵀx falls at every iteration, so the result is never worse than `start`.

    Args:
        product: v ↦ A v on (n,).
        b: (n,).
        preconditioner: v ↦ M⁻¹ v, symmetric positive definite.
        start: (n,), zero by default.
        tolerance: relative, see above.
        max_iterations: at most so many products.

    Reference: Hestenes and Stiefel, 1952; Saad, Iterative Methods for Sparse Linear Systems, algorithm 9.1.
    """
    x = torch.zeros_like(b) if start is None else start.clone()
    r = b - product(x) if start is not None else b.clone()
    z = preconditioner(r)
    rz = torch.dot(r, z)
    scale = torch.dot(b, preconditioner(b))
    threshold = tolerance**2 * float(scale)
    direction = z
    iterations = 0
    while float(rz) > threshold and iterations < max_iterations:
        image = product(direction)
        curvature = torch.dot(direction, image)
        if not float(curvature) > 0:  # rounding has used up the precision, or A is not positive definite
            break
        step = rz / curvature
        x = x + step * direction
        r = r - step * image
        z = preconditioner(r)
        rz, previous = torch.dot(r, z), rz
        direction = z + (rz / previous) * direction
        iterations += 1
    residual = (max(float(rz), 0.0) / float(scale)) ** 0.5 if float(scale) > 0 else 0.0
    return ConjugateGradients(x, iterations, residual, bool(float(rz) <= threshold))
