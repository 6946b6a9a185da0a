"""The structures: diagonal, blocks, Kronecker product with an inner diagonal, direct sums, principal parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekit.errors import CurvatureError
from sparsekit.linalg.iterative import conjugate_gradients
from sparsekit.linalg.operator import ConstrainedMinimum, LinearOperator

#: Smallest pivot, relative to the largest, below which a Cholesky factor is not trusted.
RELATIVE_PIVOT = 1e-12


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
        """D."""
        return self.d

    def inverse_diagonal(self) -> Tensor:
        """1/d."""
        return self.d.reciprocal()

    def minimise(
        self,
        fixed: Tensor,
        values: Tensor,
        linear: Tensor | None = None,
        *,
        start: Tensor | None = None,
        tolerance: float = 1e-4,
        max_iterations: int = 1000,
    ) -> ConstrainedMinimum:
        free = torch.zeros_like(self.d) if linear is None else -self.d * linear
        return ConstrainedMinimum(torch.where(fixed, values.to(self.dtype), free))


class BlockDiagonal(LinearOperator):
    """Blocks H_b of the precision on consecutive stretches of Rⁿ; exact in everything.

    Args:
        precision: (m, B, B), the blocks of H; float64 is the right type for what follows from them. In a
            stretch shorter than B the surplus rows and columns are ignored.
        sizes: lengths of the m stretches, in order; each between 1 and B.

    Raises:
        CurvatureError: a block is not positive definite to RELATIVE_PIVOT.
    """

    def __init__(self, precision: Tensor, sizes: Sequence[int]) -> None:
        lengths = torch.tensor(sizes, device=precision.device)
        super().__init__(int(lengths.sum()), precision.dtype, precision.device)
        width = precision.shape[1]
        self._inside = torch.arange(width, device=self.device) < lengths[:, None]  # (m, B)
        self.precision = _identity_where(~self._inside, precision)
        self._factor = _cholesky(self.precision)
        self.inverse = torch.cholesky_inverse(self._factor)

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

    def conditional_diagonal(self, kept: Tensor) -> Tensor:
        """Exact, by one Cholesky factor of H_SS a block."""
        fixed = self._scatter((~kept)[:, None])[..., 0]
        factor = _cholesky(_identity_where(fixed, self.precision))
        diagonal = torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2)[self._inside]
        return torch.where(kept, diagonal, 0.0)

    def minimise(
        self,
        fixed: Tensor,
        values: Tensor,
        linear: Tensor | None = None,
        *,
        start: Tensor | None = None,
        tolerance: float = 1e-4,
        max_iterations: int = 1000,
    ) -> ConstrainedMinimum:
        """Exact: H_SS x_S = −H_SC x_C − c_S block by block, with identity rows in place of C."""
        target = torch.where(fixed, values.to(self.dtype), 0.0)
        right = -self.solve(target) if linear is None else -(self.solve(target) + linear.to(self.dtype))
        right = torch.where(fixed, target, right)
        factor = _cholesky(_identity_where(self._scatter(fixed[:, None])[..., 0], self.precision))
        solution = torch.cholesky_solve(self._scatter(right[:, None]), factor)[self._inside][:, 0]
        return ConstrainedMinimum(torch.where(fixed, target, solution))


class KroneckerDiagonal(LinearOperator):
    """Σ = (L ⊗ R) diag(q) (L ⊗ R)ᵀ on matrices U (rows, columns) taken row by row: U ↦ L (q ∘ (Lᵀ U R)) Rᵀ.

    The eigenvectors of two Kronecker factors with their own eigenvalues (EKFAC; George et al., 2018) where
    L and R are orthogonal, and a two-factor product LLᵀ ⊗ RRᵀ where q is one. A product costs four small
    matrix products.

    Args:
        left: L (rows, rows), invertible.
        right: R (columns, columns), invertible.
        q: (rows, columns) > 0.
        orthogonal: promise that L and R are orthogonal, so that no inverse of them is taken.
    """

    def __init__(self, left: Tensor, right: Tensor, q: Tensor, *, orthogonal: bool) -> None:
        super().__init__(q.numel(), q.dtype, q.device)
        self.left, self.right, self.q = left, right, q
        if orthogonal:
            self._inverse_left, self._inverse_right = left, right
        else:
            self._inverse_left, self._inverse_right = _inverse_transpose(left), _inverse_transpose(right)

    @staticmethod
    def _sandwich(L: Tensor, q: Tensor, R: Tensor, X: Tensor) -> Tensor:
        U = X.mT.reshape(-1, *q.shape)  # (k, rows, columns)
        return (L @ (q * (L.mT @ U @ R)) @ R.mT).reshape(X.shape[1], -1).mT

    def _matmul(self, X: Tensor) -> Tensor:
        return self._sandwich(self.left, self.q, self.right, X)

    def _solve(self, B: Tensor) -> Tensor:
        return self._sandwich(self._inverse_left, self.q.reciprocal(), self._inverse_right, B)

    def diagonal(self) -> Tensor:
        """(L∘L) q (R∘R)ᵀ, for any L and R."""
        return (self.left.square() @ self.q @ self.right.square().mT).reshape(-1)

    def inverse_diagonal(self) -> Tensor:
        """The same with L⁻ᵀ, 1/q and R⁻ᵀ."""
        inverse = self._inverse_left.square() @ self.q.reciprocal() @ self._inverse_right.square().mT
        return inverse.reshape(-1)


class DirectSum(LinearOperator):
    """Operators on consecutive stretches of Rⁿ, independent of one another: one a layer."""

    def __init__(self, parts: Sequence[LinearOperator]) -> None:
        super().__init__(sum(part.size for part in parts), parts[0].dtype, parts[0].device)
        self.parts = tuple(parts)
        self._sizes = [part.size for part in parts]
        self.has_direct_solve = all(part.has_direct_solve for part in parts)

    def _split(self, X: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * len(self.parts) if X is None else X.split(self._sizes)

    def _matmul(self, X: Tensor) -> Tensor:
        return torch.cat([part @ x for part, x in zip(self.parts, X.split(self._sizes), strict=True)])

    def _solve(self, B: Tensor) -> Tensor:
        return torch.cat([part.solve(b) for part, b in zip(self.parts, B.split(self._sizes), strict=True)])

    def diagonal(self) -> Tensor:
        return torch.cat([part.diagonal() for part in self.parts])

    def inverse_diagonal(self) -> Tensor:
        return torch.cat([part.inverse_diagonal() for part in self.parts])

    def conditional_diagonal(self, kept: Tensor) -> Tensor:
        """Each part's own."""
        stretches = zip(self.parts, kept.split(self._sizes), strict=True)
        return torch.cat([part.conditional_diagonal(k) for part, k in stretches])

    def minimise(
        self,
        fixed: Tensor,
        values: Tensor,
        linear: Tensor | None = None,
        *,
        start: Tensor | None = None,
        tolerance: float = 1e-4,
        max_iterations: int = 1000,
    ) -> ConstrainedMinimum:
        """Part by part, so that each takes its smaller side and its own number of iterations."""
        minima = [
            part.minimise(f, v, c, start=s, tolerance=tolerance, max_iterations=max_iterations)
            for part, f, v, c, s in zip(
                self.parts,
                fixed.split(self._sizes),
                values.split(self._sizes),
                self._split(linear),
                self._split(start),
                strict=True,
            )
        ]
        return ConstrainedMinimum(
            torch.cat([m.solution for m in minima]),
            max(m.iterations for m in minima),
            max(m.residual for m in minima),
        )


class Principal(LinearOperator):
    """Σ_SS on the kept coordinates S and its own diagonal elsewhere, with no coupling between the two.

    For an operator that was fitted to the inverse of the *surviving* block (H_SS)⁻¹: coordinates outside S
    are gone. H is known by conjugate gradients only, so constrained minima use the products with Σ.
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
        columns = [
            conjugate_gradients(
                lambda v: self @ v,
                b,
                preconditioner=lambda v: v / self._diagonal,
                tolerance=1e-6,
                max_iterations=2000,
            ).solution
            for b in B.mT
        ]
        return torch.stack(columns, dim=1)

    def diagonal(self) -> Tensor:
        return self._diagonal

    def inverse_diagonal(self) -> Tensor:
        """1 / diag Σ, a lower bound of diag H; used as a preconditioner only."""
        return self._diagonal.reciprocal()


def _identity_where(where: Tensor, blocks: Tensor) -> Tensor:
    """Blocks (m, B, B) with the rows and columns at `where` (m, B) replaced by the identity's."""
    clean = blocks.masked_fill(where[:, :, None] | where[:, None, :], 0.0)
    return clean + torch.diag_embed(where.to(blocks.dtype))


def _cholesky(blocks: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(blocks)
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    bad = (failed > 0) | ~(pivots.amin(1) > RELATIVE_PIVOT * pivots.amax(1))
    if bool(bad.any()):
        scale = float(blocks[bad].diagonal(dim1=1, dim2=2).nan_to_num().amax())
        raise CurvatureError(
            f"{int(bad.sum())} of {len(blocks)} curvature blocks are not positive definite to working precision "
            f"(largest diagonal {scale:.1e}); a damping of at least {max(scale, 1e-30) * 1e-10:.1e} would do"
        )
    return factor


def _inverse_transpose(matrix: Tensor) -> Tensor:
    return torch.linalg.inv(matrix.double()).mT.to(matrix.dtype).contiguous()
