"""Preconditioned conjugate gradients with a stated stopping rule and a report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.errors import CurvatureError

#: A solve that stopped early is accepted if its residual is at most SLACK times the tolerance.
SLACK = 100


#: Iterations between two looks at the residual on an accelerator, whose host has to wait for each. Those after the
#: solution is reached change nothing.
CHECK_EVERY = 8


@dataclass(frozen=True)
class ConjugateGradients:
    """The result of a solve.

    Attributes:
        solution: (n,).
        iterations: number of products with A.
        residual: ‖b − A x‖ / ‖b‖ in the preconditioner's norm, as the recursion computes it.
        converged: whether `residual` reached the tolerance.

    The residual is NaN where bᵀM⁻¹b is negative: the preconditioner is then not positive definite.
    """

    solution: Tensor
    iterations: int
    residual: float
    converged: bool

    def accepted(self, tolerance: float) -> ConjugateGradients:
        """This solve, if its residual is at most SLACK times the tolerance that was asked for.

        In float32, rounding can end the progress before the tolerance is reached; such a solution is still useful.

        Raises:
            CurvatureError: the residual is larger, or not a number.
        """
        if not self.converged and not self.residual <= SLACK * tolerance:
            raise CurvatureError(
                f"conjugate gradients stopped after {self.iterations} iterations with the relative residual "
                f"{self.residual:.1e} ({tolerance:.0e} was asked for); raise the damping"
            )
        return self


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
    M⁻¹ rather than the plain one, because the scales of weights in a network differ by orders of magnitude. It
    also stops after `max_iterations`, or where a direction's curvature is not positive; the result then has
    `converged=False` and no error is raised: the caller decides. `LinearOperator.minimise` and `Principal` call
    `accepted` on the result, so they accept a residual of up to SLACK = 100 times the tolerance. ½xᵀAx − bᵀx falls at
    every iteration, so the result is never worse than `start`.

    Args:
        product: v ↦ A v on (n,).
        b: (n,).
        preconditioner: v ↦ M⁻¹ v, symmetric positive definite.
        start: (n,), zero by default.
        tolerance: relative, see above.
        max_iterations: largest number of products.

    Reference: Hestenes and Stiefel, 1952; Saad, Iterative Methods for Sparse Linear Systems, algorithm 9.1.
    """
    x = torch.zeros_like(b) if start is None else start.clone()
    r = b - product(x) if start is not None else b.clone()
    z = preconditioner(r)
    rz = torch.dot(r, z)
    scale = torch.dot(b, preconditioner(b))
    threshold = tolerance**2 * scale
    direction = z
    every = 1 if b.device.type == "cpu" else CHECK_EVERY
    going, done = rz > threshold, torch.zeros((), dtype=torch.long, device=b.device)
    for iteration in range(max_iterations):
        if iteration % every == 0 and not bool(going):
            break
        image = product(direction)
        curvature = torch.dot(direction, image)
        going = going & (curvature > 0)  # where not, the precision is exhausted, or A is not positive definite
        step = torch.where(going, rz / curvature, 0.0)
        x = x + step * direction
        r = r - step * image
        z = preconditioner(r)
        rz, previous = torch.where(going, torch.dot(r, z), rz), rz
        direction = z + torch.where(going, rz / previous, 0.0) * direction
        done += going
        going = going & (rz > threshold)
    iterations, norm, left = torch.stack([part.double() for part in (done, scale, rz)]).tolist()
    residual = (max(left, 0.0) / norm) ** 0.5 if norm > 0 else (0.0 if norm == 0 else math.nan)
    return ConjugateGradients(x, int(iterations), residual, norm >= 0 and left <= tolerance**2 * norm)
