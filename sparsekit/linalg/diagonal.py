"""A diagonal operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekit.linalg.operator import ConstrainedMinimum, Iteration, LinearOperator, padded


class Diagonal(LinearOperator):
    """Σ = diag(d), d (n,) > 0."""

    def __init__(self, d: Tensor) -> None:
        super().__init__(d.numel(), d.dtype, d.device)
        self.d = d

    def _matmul(self, X: Tensor) -> Tensor:
        return self.d[:, None] * X

    def _solve(self, B: Tensor) -> Tensor:
        return B / self.d[:, None]

    def diagonal(self) -> Tensor:
        """The vector d."""
        return self.d

    def inverse_diagonal(self) -> Tensor:
        """1/d."""
        return self.d.reciprocal()

    def stretches(self) -> Sequence[int]:
        return [1] * self.size

    def blocks(self, index: Tensor) -> Tensor:
        return padded(torch.diag_embed(self.d[index.clamp_min(0)]), index)

    def inverse_blocks(self, index: Tensor) -> Tensor:
        return padded(torch.diag_embed(self.d[index.clamp_min(0)].reciprocal()), index)

    def _minimise(
        self, fixed: Tensor, target: Tensor, linear: Tensor | None, iteration: Iteration
    ) -> ConstrainedMinimum:
        free = torch.zeros_like(self.d) if linear is None else -self.d * linear
        return ConstrainedMinimum(torch.where(fixed, target, free))
