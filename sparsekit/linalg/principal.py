"""Σ restricted to the kept coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekit.linalg.iterative import conjugate_gradients
from sparsekit.linalg.operator import LinearOperator


class Principal(LinearOperator):
    """Σ_SS on the kept coordinates S and its own diagonal elsewhere, with no coupling between the two.

    For an operator that was fitted to (H_SS)⁻¹, the inverse of the block of the *survivors*: coordinates outside S
    are removed. A product with H takes conjugate gradients, so constrained minima use the products with Σ.

    Raises:
        CurvatureError: on `solve`, where conjugate gradients do not converge.
    """

    has_direct_solve = False

    def __init__(self, base: LinearOperator, kept: Tensor) -> None:
        super().__init__(base.size, base.dtype, base.device)
        self.base = base
        self.kept = kept
        self._inside = kept.to(base.dtype)[:, None]
        self._diagonal = base.diagonal()

    def _matmul(self, X: Tensor) -> Tensor:
        inside = self._inside * (self.base @ (self._inside * X))
        return inside + (1 - self._inside) * self._diagonal[:, None] * X

    def _solve(self, B: Tensor) -> Tensor:
        tolerance = 1e-6
        columns = []
        for b in B.mT:
            report = conjugate_gradients(
                lambda v: self @ v,
                b,
                preconditioner=lambda v: v / self._diagonal,
                tolerance=tolerance,
                max_iterations=2000,
            )
            columns.append(report.accepted(tolerance).solution)
        return torch.stack(columns, dim=1)

    def diagonal(self) -> Tensor:
        return self._diagonal

    def inverse_diagonal(self) -> Tensor:
        """1/Σ_ii, (n,): not diag H but a lower bound of it, exact outside S; for preconditioners only.

        Diag H itself would take one solve for each coordinate.
        """
        return self._diagonal.reciprocal()

    def blocks(self, index: Tensor) -> Tensor:
        found, outside = self.base.blocks(index), ~self.kept[index.clamp_min(0)]
        diagonal = torch.diag_embed(found.diagonal(dim1=1, dim2=2) * outside)
        return found.masked_fill(outside[:, :, None] | outside[:, None, :], 0.0) + diagonal
