"""A precision matrix given only by its products, with an operator that approximates its inverse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsekit.errors import CurvatureError
from sparsekit.linalg.iterative import conjugate_gradients
from sparsekit.linalg.operator import ConstrainedMinimum, Iteration, LinearOperator


class MatrixFree(LinearOperator):
    """Σ = H⁻¹ for an H given by its products, solved by conjugate gradients with an approximation as preconditioner.

    Diagonals and principal blocks are those of the approximation: exact ones would take n products.

    Args:
        product: v (n,) ↦ H v, symmetric positive definite.
        approximation: Σ̃ ≈ H⁻¹, of the vectors' size, type and device.
        tolerance: relative residual in the norm of Σ̃ at which a solve ends.
        max_iterations: largest number of products for each solve. A constrained minimum that has not converged by then
            is returned with its residual; it is never worse than that of the approximation.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        approximation: LinearOperator,
        *,
        tolerance: float = 1e-4,
        max_iterations: int = 1000,
    ) -> None:
        super().__init__(approximation.size, approximation.dtype, approximation.device)
        self.product, self.approximation = product, approximation
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self._iteration = Iteration(None, tolerance, max_iterations)

    def _matmul(self, X: Tensor) -> Tensor:
        columns = []
        for b in X.mT:
            report = conjugate_gradients(
                self.product,
                b,
                preconditioner=lambda v: self.approximation @ v,
                tolerance=self.tolerance,
                max_iterations=self.max_iterations,
            )
            if not report.converged:
                raise CurvatureError(
                    f"conjugate gradients stopped after {report.iterations} iterations with the relative residual "
                    f"{report.residual:.1e} ({self.tolerance:.0e} was asked for); raise the damping"
                )
            columns.append(report.solution)
        return torch.stack(columns, dim=1)

    def _solve(self, B: Tensor) -> Tensor:
        return torch.stack([self.product(b.contiguous()) for b in B.mT], dim=1)

    def diagonal(self) -> Tensor:
        """Of the approximation."""
        return self.approximation.diagonal()

    def inverse_diagonal(self) -> Tensor:
        """Of the approximation's inverse."""
        return self.approximation.inverse_diagonal()

    def blocks(self, index: Tensor) -> Tensor:
        """Of the approximation."""
        return self.approximation.blocks(index)

    def inverse_blocks(self, index: Tensor) -> Tensor:
        """Of the approximation's inverse."""
        return self.approximation.inverse_blocks(index)

    def conditioned_blocks(self, index: Tensor) -> Tensor:
        """Of the approximation."""
        return self.approximation.conditioned_blocks(index)

    def _minimise(
        self, fixed: Tensor, target: Tensor, linear: Tensor | None, iteration: Iteration
    ) -> ConstrainedMinimum:
        """On the free coordinates S, preconditioned by Σ̃_SS, from the approximation's own minimum."""
        free, start = (~fixed).to(self.dtype), iteration.start
        if start is None:
            start = self.approximation.minimise(fixed, target, linear).solution
        right = -(self.product(target) if linear is None else self.product(target) + linear.to(self.dtype))
        report = conjugate_gradients(
            lambda v: free * self.product(v),
            free * right,
            preconditioner=lambda v: free * (self.approximation @ v),
            start=free * start,
            tolerance=iteration.tolerance,
            max_iterations=iteration.max_iterations,
        )
        return ConstrainedMinimum(torch.where(fixed, target, report.solution), report.iterations, report.residual)
