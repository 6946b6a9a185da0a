"""The inverse of a damped Gram matrix H = γI + GᵀG/m from the rows G; neither matrix is formed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from sparsekit.errors import CurvatureError
from sparsekit.linalg.operator import ConstrainedMinimum, Iteration, LinearOperator, missing_damping, padded

#: Bytes of columns of G that are processed at a time, and copied to the device where G is on the host.
PAGE_BYTES = 1 << 25

#: Rows of a triangular matrix that are processed at a time, so that its other half is not computed.
TILE = 128

#: Rows and columns of G that products with vectors copy at a time on a CPU, so that the copy stays in its cache.
CELL = 64, 4096

#: Largest bound of λmax/γ at which float32 squares of the rows lose no more than about three digits.
SINGLE_PRECISION_RANGE = 1e4


class DiagonalPlusLowRank(LinearOperator):
    """Σ = (γI + GᵀG/m)⁻¹ from the rows G (r, n), by Woodbury's identity.

    With the Cholesky factor of the r × r matrix K = γmI + GGᵀ = LLᵀ and V = L⁻¹G:
    Σ = (I − VᵀV)/γ. It takes the memory of G, and a product takes two passes over G. V is not stored: pages of its
    columns are computed where they are needed. K and its factor are always float64.

    The type of the other results depends on b = tr(GᵀG)/(mγ), a bound of λmax/γ. GGᵀ, 1 − Σ V², products Σv and linear
    terms contain differences of almost equal numbers and lose a factor of b in precision: they are in float64 where b
    is at least SINGLE_PRECISION_RANGE. Products Hv and minima without a linear term lose √b in the norm of H: they are
    in float64 where √b is.

    Args:
        rows: G (r, n), on the device or in host memory.
        damping: γ > 0.
        count: m, the divisor of the Gram matrix; it may differ from r.
        device: of the vectors; by default that of the rows.
        kept: (n,) bool; the columns of the others count as zero, which decouples them.

    Raises:
        CurvatureError: K is not positive definite to working precision.

    Reference: Frantar, Kurtic and Alistarh, 2021 (M-FAC), whose recursion gives the same matrix.
    """

    def __init__(
        self,
        rows: Tensor,
        damping: float,
        count: int,
        *,
        device: torch.device | None = None,
        kept: Tensor | None = None,
    ) -> None:
        super().__init__(rows.shape[1], rows.dtype, device or rows.device)
        self.rows, self.damping, self.count, self.kept = rows, damping, count, kept
        self._page = max(1, PAGE_BYTES // (8 * max(len(rows), 1)))

    @classmethod
    def of_precision(
        cls,
        rows: Tensor,
        damping: float,
        count: int,
        *,
        device: torch.device | None = None,
        kept: Tensor | None = None,
    ) -> Self:
        """The constructor under a name that says that it takes the parts of H = γI + GᵀG/m, not of Σ."""
        return cls(rows, damping, count, device=device, kept=kept)

    # -- pages of columns ------------------------------------------------------------------------------------
    def _pages(self, dtype: torch.dtype, page: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        page = page or self._page
        for start in range(0, self.size, page):
            where = slice(start, min(start + page, self.size))
            columns = self.rows[:, where].to(device=self.device, dtype=dtype, non_blocking=True)
            yield where, columns if self.kept is None else columns * self.kept[where]

    @cached_property
    def _squares(self) -> Tensor:
        """Sums of squares of the columns, (n,), float64."""
        out = torch.empty(self.size, dtype=torch.float64, device=self.device)
        for where, columns in self._pages(self.dtype):
            out[where] = columns.square().sum(0)
        return out

    @cached_property
    def _spread(self) -> float:
        """b, the bound of λmax/γ."""
        return float(self._squares.sum()) / (self.count * self.damping)

    @property
    def working(self) -> torch.dtype:
        """The dtype in which squares of the rows are computed."""
        return self.dtype if self._spread < SINGLE_PRECISION_RANGE else torch.float64

    @property
    def _of_products(self) -> torch.dtype:
        """The dtype in which products of the rows with vectors are computed where nothing cancels."""
        return self.dtype if self._spread < SINGLE_PRECISION_RANGE**2 else torch.float64

    @cached_property
    def _factor(self) -> Tensor:
        """L, (r, r), float64."""
        return self._cholesky(self._gram())

    def _gram(self, where: Tensor | None = None) -> Tensor:
        """GGᵀ, float64, or that of the columns at `where` (n,) bool."""
        out = torch.zeros(len(self.rows), len(self.rows), dtype=torch.float64, device=self.device)
        for page, columns in self._pages(self.working):
            chosen = columns if where is None else columns[:, where[page]]
            for tile, upto in self._tiles():
                out[tile, :upto] += chosen[tile] @ chosen[:upto].mT
        return out.tril_() + out.tril(-1).mT

    def _tiles(self) -> Iterator[tuple[slice, int]]:
        """Slices of the rows of a lower triangular (r, r) matrix, each with the number of columns that it fills."""
        for start in range(0, len(self.rows), TILE):
            end = min(start + TILE, len(self.rows))
            yield slice(start, end), end

    def _cholesky(self, gram: Tensor) -> Tensor:
        gram.diagonal().add_(self.damping * self.count)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if int(failed):
            raise CurvatureError(
                f"the Gram matrix of {len(gram)} gradient rows is not positive definite to working precision at "
                f"damping {self.damping:.1e}; "
                + missing_damping(gram[None] / self.count, len(gram) * torch.finfo(gram.dtype).eps)
            )
        return factor

    def _cells(self, dtype: torch.dtype) -> Iterator[tuple[slice, Iterator[tuple[slice, Tensor]]]]:
        """Pages of columns, each with its parts of G, some rows at a time, in `dtype`; the next overwrites the last."""
        if dtype == self.dtype and self.rows.device == self.device and self.kept is None:
            for where, columns in self._pages(dtype, 16 * self._page):
                yield where, iter([(slice(0, len(columns)), columns)])
            return
        height, width = CELL if self.device.type == "cpu" else (len(self.rows), self._page)
        buffer = torch.empty(height, min(width, self.size), dtype=dtype, device=self.device)  # allocation is slow

        def cells(where: slice) -> Iterator[tuple[slice, Tensor]]:
            for start in range(0, len(self.rows), height):
                which = slice(start, min(start + height, len(self.rows)))
                cell = buffer[: which.stop - which.start, : where.stop - where.start]
                cell.copy_(self.rows[which, where], non_blocking=True)
                yield which, cell if self.kept is None else cell.mul_(self.kept[where])

        for start in range(0, self.size, width):
            where = slice(start, min(start + width, self.size))
            yield where, cells(where)

    def _project(self, X: Tensor, dtype: torch.dtype) -> Tensor:
        """G X, (r, k), float64, computed in `dtype`."""
        out = torch.zeros(len(self.rows), X.shape[1], dtype=torch.float64, device=self.device)
        for where, cells in self._cells(dtype):
            part = X[where].to(dtype)
            for which, cell in cells:
                out[which] += cell @ part
        return out

    def _project_back(self, Y: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Gᵀ Y by pages, for Y (r, k), computed in `dtype`."""
        Y = Y.to(dtype)
        for where, cells in self._cells(dtype):
            out = Y.new_zeros(where.stop - where.start, Y.shape[1])
            for which, cell in cells:
                out.addmm_(cell.mT, Y[which])
            yield where, out

    # -- the operator ------------------------------------------------------------------------------------------
    def _matmul(self, X: Tensor) -> Tensor:
        inner = torch.cholesky_solve(self._project(X, self.working), self._factor)
        out = torch.empty_like(X)
        for where, part in self._project_back(inner, self.working):
            out[where] = (X[where] - part) / self.damping
        return out

    def _solve(self, B: Tensor) -> Tensor:
        inner = self._project(B, self._of_products) / self.count
        out = torch.empty_like(B)
        for where, part in self._project_back(inner, self._of_products):
            out[where] = self.damping * B[where] + part
        return out

    def diagonal(self) -> Tensor:
        """(1 − Σ_rows V²)/γ."""
        return self._diagonal.clone()

    @cached_property
    def _diagonal(self) -> Tensor:
        """`diagonal()`, cached: it costs as much as the factor, and scores and compensation need it at every cut."""
        out = torch.empty(self.size, dtype=self.dtype, device=self.device)
        eye = torch.eye(len(self.rows), dtype=torch.float64, device=self.device)
        inverse = torch.linalg.solve_triangular(self._factor, eye, upper=False).to(self.working)
        for where, columns in self._pages(self.working):
            squares = torch.zeros(columns.shape[1], dtype=columns.dtype, device=self.device)
            for tile, upto in self._tiles():
                squares += (inverse[tile, :upto] @ columns[:upto]).square_().sum(0)
            out[where] = ((1 - squares) / self.damping).to(self.dtype)
        return out

    def inverse_diagonal(self) -> Tensor:
        """γ + Σ_rows G²/m."""
        return (self.damping + self._squares / self.count).to(self.dtype)

    def blocks(self, index: Tensor) -> Tensor:
        """(I − V_GᵀV_G)/γ."""
        eye = torch.eye(index.shape[1], dtype=torch.float64, device=self.device)
        out = []
        for columns in self._columns(index):
            V = torch.linalg.solve_triangular(self._factor, columns, upper=False)
            out.append((eye - V.mT @ V) / self.damping)
        return padded(torch.cat(out).to(self.dtype), index)

    def inverse_blocks(self, index: Tensor) -> Tensor:
        """γI + G_GᵀG_G/m, float64."""
        eye = self.damping * torch.eye(index.shape[1], dtype=torch.float64, device=self.device)
        return padded(torch.cat([eye + G.mT @ G / self.count for G in self._columns(index)]), index)

    def _columns(self, index: Tensor) -> Iterator[Tensor]:
        """The columns of G in groups (m, B), a few groups at a time: (·, r, B), float64."""
        for part in index.split(max(1, self._page // index.shape[1])):
            columns = self.rows[:, part.clamp_min(0).flatten().to(self.rows.device)].to(self.device, torch.float64)
            if self.kept is not None:
                columns = columns * self.kept[part.clamp_min(0).flatten()]
            yield columns.view(len(columns), *part.shape).movedim(0, 1)

    def conditioned(self, kept: Tensor) -> DiagonalPlusLowRank:
        """Exact: the same rows without the columns of fixed coordinates."""
        both = kept if self.kept is None else kept & self.kept
        return DiagonalPlusLowRank.of_precision(self.rows, self.damping, self.count, device=self.device, kept=both)

    def _minimise(
        self, fixed: Tensor, target: Tensor, linear: Tensor | None, iteration: Iteration
    ) -> ConstrainedMinimum:
        """In closed form, through the r × r matrix K_S = γmI + G_S G_Sᵀ of the free columns S.

        x_S = −G_Sᵀ K_S⁻¹ G_C x_C − H_SS⁻¹ c_S. In the first term nothing cancels, whatever the damping. K_S is
        computed from the free columns, or from K and the fixed columns, whichever are fewer.
        """
        if int(fixed.count_nonzero()) < self.size // 2:
            gram = self._factor @ self._factor.mT
            gram.diagonal().sub_(self.damping * self.count)
            gram -= self._gram(fixed)
        else:
            gram = self._gram(~fixed)
        factor = self._cholesky(gram)
        taken = self._of_products if linear is None else self.working
        shift = torch.zeros_like(target, dtype=taken)  # c_S/γ
        if linear is not None:
            shift = torch.where(fixed, 0.0, linear.to(taken)) / self.damping
        # H_SS⁻¹ (H_SC x_C + c_S), both terms by one application of Woodbury's identity
        inner = self._project((target - shift)[:, None], taken)
        out = torch.empty_like(target)
        for where, part in self._project_back(torch.cholesky_solve(inner, factor), taken):
            out[where] = -part[:, 0] - shift[where]
        return ConstrainedMinimum(torch.where(fixed, target, out))
