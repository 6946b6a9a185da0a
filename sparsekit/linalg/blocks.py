"""Blocks of the precision on consecutive stretches of Rⁿ."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from sparsekit.linalg.operator import ConstrainedMinimum, Iteration, LinearOperator, cholesky, padded


class BlockDiagonal(LinearOperator):
    """Blocks H_b of the precision on consecutive stretches of Rⁿ; every result is exact.

    Args:
        precision: (m, B, B), the blocks of H, best in float64. In a stretch shorter than B the surplus rows and
            columns are ignored.
        sizes: lengths of the m stretches, in order; each between 1 and B.

    Raises:
        CurvatureError: on use, where a block is not positive definite to RELATIVE_PIVOT.
    """

    def __init__(self, precision: Tensor, sizes: Sequence[int]) -> None:
        lengths = torch.tensor(sizes, device=precision.device)
        super().__init__(int(lengths.sum()), precision.dtype, precision.device)
        width = precision.shape[1]
        self._sizes = list(sizes)
        self._inside = torch.arange(width, device=self.device) < lengths[:, None]  # (m, B)
        self.precision = precision if bool(self._inside.all()) else decoupled(~self._inside, precision)

    @classmethod
    def of_precision(cls, precision: Tensor, sizes: Sequence[int]) -> Self:
        """The constructor under a name that says that it takes blocks of H = Σ⁻¹, not of Σ."""
        return cls(precision, sizes)

    @cached_property
    def inverse(self) -> Tensor:
        """(m, B, B), the blocks of Σ."""
        return torch.cholesky_inverse(cholesky(self.precision))

    def _scatter(self, X: Tensor) -> Tensor:
        """(n, k) -> (m, B, k), zero in the surplus."""
        out = X.new_zeros(*self._inside.shape, X.shape[1])
        out[self._inside] = X
        return out

    def _matmul(self, X: Tensor) -> Tensor:
        return (self.inverse @ self._scatter(X))[self._inside]

    def _solve(self, B: Tensor) -> Tensor:
        return (self.precision @ self._scatter(B))[self._inside]

    def diagonal(self) -> Tensor:
        return self.inverse.diagonal(dim1=1, dim2=2)[self._inside]

    def inverse_diagonal(self) -> Tensor:
        return self.precision.diagonal(dim1=1, dim2=2)[self._inside]

    def conditioned(self, kept: Tensor) -> BlockDiagonal:
        """Exact, by one Cholesky factor of H_SS for each block."""
        return BlockDiagonal.of_precision(
            decoupled(self._scatter((~kept)[:, None])[..., 0], self.precision), self._sizes
        )

    def stretches(self) -> Sequence[int]:
        return self._sizes

    def blocks(self, index: Tensor) -> Tensor:
        return self._principal(self.inverse, index)

    def inverse_blocks(self, index: Tensor) -> Tensor:
        return self._principal(self.precision, index)

    def _principal(self, matrices: Tensor, index: Tensor) -> Tensor:
        place = self._inside.nonzero()[index.clamp_min(0)]  # (m, B, 2): block and position in it
        block, position = place[..., 0], place[..., 1]
        found = matrices[block[:, :, None], position[:, :, None], position[:, None, :]]
        return padded(found * (block[:, :, None] == block[:, None, :]), index)

    def _minimise(
        self, fixed: Tensor, target: Tensor, linear: Tensor | None, iteration: Iteration
    ) -> ConstrainedMinimum:
        """Exact: H_SS x_S = −H_SC x_C − c_S block by block, with C decoupled."""
        right = -self.solve(target) if linear is None else -(self.solve(target) + linear.to(self.dtype))
        right = torch.where(fixed, 0.0, right)
        factor = cholesky(decoupled(self._scatter(fixed[:, None])[..., 0], self.precision))
        solution = torch.cholesky_solve(self._scatter(right[:, None]), factor)[self._inside][:, 0]
        return ConstrainedMinimum(torch.where(fixed, target, solution))


def decoupled(where: Tensor, blocks: Tensor, scale: Tensor | None = None) -> Tensor:
    """Blocks (m, B, B) without coupling to the coordinates at `where` (m, B); their diagonal entries are replaced.

    The new entries are `scale`, or the mean of the block's other diagonal entries, so that no pivot is small beside
    them.
    """
    if scale is None:
        diagonal, left = blocks.diagonal(dim1=1, dim2=2), (~where).sum(1)
        mean = diagonal.masked_fill(where, 0.0).sum(1) / left.clamp_min(1)
        scale = torch.where((left > 0) & (mean > 0), mean, 1.0)[:, None]
    clean = blocks.masked_fill(where[:, :, None] | where[:, None, :], 0.0)
    clean.diagonal(dim1=1, dim2=2).add_(where * scale)
    return clean
