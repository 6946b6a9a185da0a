"""The same block of the precision for many rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor

from sparsekit.linalg.blocks import BlockDiagonal, decoupled
from sparsekit.linalg.directsum import gathered
from sparsekit.linalg.operator import ConstrainedMinimum, Iteration, LinearOperator, padded


class RepeatedBlock(LinearOperator):
    """I_r ⊗ H_1 ⊕ … ⊕ I_r ⊗ H_g: the same precision for each of r rows, group after group.

    This is the structure of layer-wise least squares: the rows of a weight matrix do not couple, and the Hessian of
    each is the second moment of the inputs. With coordinates fixed each row has a system of its own; rows are then
    processed in slices.

    Args:
        precision: (g, B, B), the blocks of H.
        repeats: r, the number of rows for each block.
        kept: (g·r·B,) bool; coordinates outside are decoupled, with the group's mean diagonal as their precision.
        slice_bytes: largest memory of a slice of rows.
    """

    def __init__(
        self, precision: Tensor, repeats: int, kept: Tensor | None = None, *, slice_bytes: int = 1 << 28
    ) -> None:
        groups, width, _ = precision.shape
        super().__init__(groups * repeats * width, precision.dtype, precision.device)
        self.precision, self.repeats, self.kept = precision, repeats, kept
        self._shared = BlockDiagonal.of_precision(precision, [width] * groups) if kept is None else None
        self._scale = precision.diagonal(dim1=1, dim2=2).mean(1)  # (g,), the precision of decoupled coordinates
        self._bytes = slice_bytes
        self._slice = max(1, slice_bytes // (4 * width * width * precision.element_size()))

    @classmethod
    def of_precision(
        cls, precision: Tensor, repeats: int, kept: Tensor | None = None, *, slice_bytes: int = 1 << 28
    ) -> Self:
        """The constructor under a name that says that it takes blocks of H = Σ⁻¹, not of Σ."""
        return cls(precision, repeats, kept, slice_bytes=slice_bytes)

    def _rows(self, kept: Tensor | None) -> Iterator[tuple[slice, BlockDiagonal]]:
        """The coordinates of consecutive rows and their operator, conditioned on `kept`."""
        groups, width, _ = self.precision.shape
        for group in range(groups):
            for first in range(0, self.repeats, self._slice):
                count = min(self._slice, self.repeats - first)
                start = (group * self.repeats + first) * width
                where = slice(start, start + count * width)
                blocks = self.precision[group].expand(count, width, width)
                if kept is not None:
                    blocks = decoupled(~kept[where].view(count, width), blocks, self._scale[group])
                yield where, BlockDiagonal.of_precision(blocks, [width] * count)

    def _by_row(self, X: Tensor) -> Tensor:
        """(n, k) -> (g, B, r·k)."""
        groups, width, _ = self.precision.shape
        return X.view(groups, self.repeats, width, -1).transpose(1, 2).reshape(groups, width, -1)

    def _flat(self, Y: Tensor, k: int) -> Tensor:
        groups, width, _ = self.precision.shape
        return Y.view(groups, width, self.repeats, k).transpose(1, 2).reshape(self.size, k)

    def _matmul(self, X: Tensor) -> Tensor:
        if self._shared is not None:
            return self._flat(self._shared.inverse @ self._by_row(X), X.shape[1])
        return torch.cat([rows @ X[where] for where, rows in self._rows(self.kept)])

    def _solve(self, B: Tensor) -> Tensor:
        if self.kept is None:
            return self._flat(self.precision @ self._by_row(B), B.shape[1])
        inside = self.kept.to(B.dtype)[:, None]
        image = self._flat(self.precision @ self._by_row(inside * B), B.shape[1])
        return inside * image + (1 - inside) * self._outside()[:, None] * B

    def _outside(self) -> Tensor:
        return self._scale.repeat_interleave(self.size // len(self._scale))

    def diagonal(self) -> Tensor:
        if self._shared is not None:
            return self._repeated(self._shared.inverse.diagonal(dim1=1, dim2=2))
        return torch.cat([rows.diagonal() for _, rows in self._rows(self.kept)])

    def inverse_diagonal(self) -> Tensor:
        diagonal = self._repeated(self.precision.diagonal(dim1=1, dim2=2))
        return diagonal if self.kept is None else torch.where(self.kept, diagonal, self._outside())

    def _repeated(self, diagonal: Tensor) -> Tensor:
        return diagonal[:, None, :].expand(-1, self.repeats, -1).reshape(-1)

    def stretches(self) -> Sequence[int]:
        groups, width, _ = self.precision.shape
        return [width] * (groups * self.repeats)

    def conditioned(self, kept: Tensor) -> RepeatedBlock:
        """Exact, by one Cholesky factor of H_SS for each row, computed at use."""
        both = kept if self.kept is None else kept & self.kept
        return RepeatedBlock.of_precision(self.precision, self.repeats, both, slice_bytes=self._bytes)

    def blocks(self, index: Tensor) -> Tensor:
        if self._shared is None:
            return gathered(index, self._rows(self.kept), LinearOperator.blocks)
        return padded(self._principal(self._shared.inverse, index), index)

    def inverse_blocks(self, index: Tensor) -> Tensor:
        found = self._principal(self.precision, index)
        if self.kept is not None:
            outside = ~self.kept[index.clamp_min(0)]
            stand_in = self._outside()[index.clamp_min(0)] * outside
            found = found.masked_fill(outside[:, :, None] | outside[:, None, :], 0.0) + torch.diag_embed(stand_in)
        return padded(found, index)

    def _principal(self, matrices: Tensor, index: Tensor) -> Tensor:
        row, position = index.clamp_min(0) // self.precision.shape[1], index.clamp_min(0) % self.precision.shape[1]
        group = row // self.repeats
        found = matrices[group[:, :, None], position[:, :, None], position[:, None, :]]
        return found * (row[:, :, None] == row[:, None, :])

    def _minimise(
        self, fixed: Tensor, target: Tensor, linear: Tensor | None, iteration: Iteration
    ) -> ConstrainedMinimum:
        """Exact, row by row."""
        parts = []
        for where, rows in self._rows(self.kept):
            c = None if linear is None else linear[where]
            parts.append(rows.minimise(fixed[where], target[where], c).solution)
        return ConstrainedMinimum(torch.cat(parts))
