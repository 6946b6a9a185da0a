"""An operator in rescaled coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekit.linalg.operator import ConstrainedMinimum, Iteration, LinearOperator, padded


class Rescaled(LinearOperator):
    """Σ = S Σ₀ S with S = diag(s), s (n,) > 0: an operator Σ₀ in rescaled coordinates, exact where Σ₀ is."""

    def __init__(self, base: LinearOperator, s: Tensor) -> None:
        super().__init__(base.size, base.dtype, base.device)
        self.base, self.s = base, s
        self.has_direct_solve = base.has_direct_solve

    def _matmul(self, X: Tensor) -> Tensor:
        return self.s[:, None] * (self.base @ (self.s[:, None] * X))

    def _solve(self, B: Tensor) -> Tensor:
        return self.base.solve(B / self.s[:, None]) / self.s[:, None]

    def diagonal(self) -> Tensor:
        return self.s.square() * self.base.diagonal()

    def inverse_diagonal(self) -> Tensor:
        return self.base.inverse_diagonal() / self.s.square()

    def conditioned(self, kept: Tensor) -> Rescaled:
        """As Σ₀, rescaled."""
        return Rescaled(self.base.conditioned(kept), self.s)

    def stretches(self) -> Sequence[int]:
        return self.base.stretches()

    def blocks(self, index: Tensor) -> Tensor:
        s = self.s[index.clamp_min(0)]
        return padded(self.base.blocks(index) * s[:, :, None] * s[:, None, :], index)

    def inverse_blocks(self, index: Tensor) -> Tensor:
        s = self.s[index.clamp_min(0)]
        return padded(self.base.inverse_blocks(index) / s[:, :, None] / s[:, None, :], index)

    def conditioned_blocks(self, index: Tensor) -> Tensor:
        """As Σ₀, rescaled."""
        s = self.s[index.clamp_min(0)]
        return padded(self.base.conditioned_blocks(index) * s[:, :, None] * s[:, None, :], index)

    def _minimise(
        self, fixed: Tensor, target: Tensor, linear: Tensor | None, iteration: Iteration
    ) -> ConstrainedMinimum:
        """The minimum of Σ₀ for x/s, rescaled."""
        found = self.base.minimise(
            fixed,
            target / self.s,
            None if linear is None else linear.to(self.dtype) * self.s,
            start=None if iteration.start is None else iteration.start / self.s,
            tolerance=iteration.tolerance,
            max_iterations=iteration.max_iterations,
        )
        solution = torch.where(fixed, target, self.s * found.solution)
        return ConstrainedMinimum(solution, found.iterations, found.residual)
