"""The base class of all operators: shape checks, and defaults that need only products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sparsekit.errors import CurvatureError
from sparsekit.linalg.iterative import ConjugateGradients, conjugate_gradients

#: Smallest pivot, relative to the largest, below which a Cholesky factor is not trusted.
RELATIVE_PIVOT = 1e-12

#: Largest n for which blocks of H are computed column by column, one solve for each.
MOST_COLUMNS = 20_000


@dataclass(frozen=True)
class ConstrainedMinimum:
    """The minimiser of a quadratic with some coordinates fixed, and how it was found.

    Attributes:
        solution: (n,), exactly the given values on the fixed coordinates.
        iterations: of conjugate gradients; 0 for a direct solve.
        residual: relative, as `conjugate_gradients` reports it; 0 for a direct solve.
    """

    solution: Tensor
    iterations: int = 0
    residual: float = 0.0


@dataclass(frozen=True)
class Iteration:
    """Parameters of an iterative solve.

    Attributes:
        start: (n,), a first guess for the free coordinates; None for the structure's own.
        tolerance: relative residual at which it ends.
        max_iterations: largest number of iterations.
    """

    start: Tensor | None = None
    tolerance: float = 1e-4
    max_iterations: int = 1000


class LinearOperator(ABC):
    """A symmetric positive definite operator Σ on Rⁿ that knows its inverse H = Σ⁻¹.

    A structure implements four formulas, `_matmul`, `_solve`, `diagonal` and `inverse_diagonal`. It may override what
    it computes exactly or cheaply: `conditioned`, `_minimise`, `blocks`, `inverse_blocks`, `conditioned_blocks`,
    `stretches`.

    Attributes:
        size: n.
        dtype, device: of the vectors it takes.
    """

    #: True where H v is cheap; False where it is itself a solve (then constrained minima use Σ alone).
    has_direct_solve: bool = True
    #: Default parameters of an iterative `minimise`.
    _iteration: Iteration = Iteration()

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size = size
        self.dtype = dtype
        self.device = device

    # -- implemented by each structure -------------------------------------------------------------------
    @abstractmethod
    def _matmul(self, X: Tensor) -> Tensor:
        """Σ X for X (n, k)."""

    @abstractmethod
    def _solve(self, B: Tensor) -> Tensor:
        """H B = Σ⁻¹ B for B (n, k)."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Diag Σ, (n,)."""

    @abstractmethod
    def inverse_diagonal(self) -> Tensor:
        """Diag H, (n,)."""

    # -- derived from these ------------------------------------------------------------------------------
    def __matmul__(self, X: Tensor) -> Tensor:
        """Σ X for X (n,) or (n, k)."""
        return self._matmul(X) if self._checked(X).dim() == 2 else self._matmul(X[:, None])[:, 0]

    def solve(self, B: Tensor) -> Tensor:
        """H B for B (n,) or (n, k)."""
        return self._solve(B) if self._checked(B).dim() == 2 else self._solve(B[:, None])[:, 0]

    def dense(self) -> Tensor:
        """Σ as (n, n); for tests and small n."""
        return self @ torch.eye(self.size, dtype=self.dtype, device=self.device)

    def conditioned(self, kept: Tensor) -> LinearOperator:
        """(H_SS)⁻¹ on the kept coordinates S, without coupling to the others, or the nearest the structure can do.

        (H_SS)⁻¹ is what Σ becomes once the other coordinates are fixed. The default is Σ itself, an upper bound on
        S (the two differ by a positive semidefinite matrix); a structure that can be exact overrides it.

        Args:
            kept: (n,) bool, S.
        """
        return self

    def stretches(self) -> Sequence[int]:
        """Lengths of consecutive stretches of Rⁿ that Σ does not couple with one another."""
        return [self.size]

    def blocks(self, index: Tensor) -> Tensor:
        """Principal blocks Σ_GG of groups of coordinates.

        The default takes one product for each requested coordinate: n²·|groups| work, for small n only.

        Args:
            index: (m, B) of coordinates; −1 pads short groups, whose surplus rows and columns are the identity's.

        Returns:
            (m, B, B).
        """
        return self._columnwise(self._matmul, index)

    def inverse_blocks(self, index: Tensor) -> Tensor:
        """Principal blocks H_GG of groups of coordinates, as `blocks` gives those of Σ.

        The default takes one solve for each requested coordinate.

        Raises:
            CurvatureError: the default is used, and n is larger than MOST_COLUMNS.
        """
        if self.size > MOST_COLUMNS:
            raise CurvatureError(
                f"{type(self).__name__} knows blocks of the precision by a solve for each of its {self.size:,} "
                f"coordinates, which is done for {MOST_COLUMNS:,} at most; use an estimator with blocks, a diagonal or "
                "Kronecker factors, or a saliency that needs Σ alone (obs, obs-greedy)"
            )
        return self._columnwise(self._solve, index)

    def conditioned_blocks(self, index: Tensor) -> Tensor:
        """(H_GG)⁻¹ for groups of coordinates: what Σ_GG becomes once all coordinates outside of G are fixed.

        Args:
            index: (m, B), padded as for `blocks`.

        Returns:
            (m, B, B), a new tensor, float64 where the operator's type is not precise enough.

        Raises:
            CurvatureError: a block is not positive definite to RELATIVE_PIVOT, or see `inverse_blocks`.
        """
        precision, surplus = self.inverse_blocks(index).double(), index < 0
        if bool(surplus.any()):  # ones on the diagonal would fail the pivot check beside a precision of another scale
            inside = precision.diagonal(dim1=1, dim2=2).masked_fill(surplus, 0.0)
            mean = inside.sum(1) / (~surplus).sum(1).clamp_min(1)
            precision.diagonal(dim1=1, dim2=2).copy_(torch.where(surplus, mean[:, None], inside))
        return padded(torch.cholesky_inverse(cholesky(precision)), index)

    def _columnwise(self, product: Callable[[Tensor], Tensor], index: Tensor) -> Tensor:
        """Principal blocks of a matrix that is given by its products."""
        out = []
        for group in index:
            columns = torch.zeros(self.size, len(group), dtype=self.dtype, device=self.device)
            columns[group.clamp_min(0), torch.arange(len(group), device=self.device)] = 1
            out.append(product(columns)[group.clamp_min(0)])
        return padded(torch.stack(out), index)

    @final
    def minimise(
        self,
        fixed: Tensor,
        values: Tensor,
        linear: Tensor | None = None,
        *,
        start: Tensor | None = None,
        tolerance: float | None = None,
        max_iterations: int | None = None,
    ) -> ConstrainedMinimum:
        """Minimise cᵀx + ½ xᵀH x subject to x_C = values_C.

        Start, tolerance and iterations are used by iterative solves only. A structure that has a better method than
        conjugate gradients overrides `_minimise`.

        Args:
            fixed: (n,) bool, C.
            values: (n,); only the entries in C are used.
            linear: c, (n,); zero by default.
            start: (n,), a first guess for the free coordinates.
            tolerance: see `conjugate_gradients`; the default is the operator's, usually 1e-4.
            max_iterations: see `conjugate_gradients`; the default is the operator's, usually 1000.

        Raises:
            CurvatureError: the solve stopped with a residual of more than 100 times the tolerance.
        """
        target = torch.where(fixed, self._checked(values).to(self.dtype), 0.0)
        iteration = Iteration(
            start,
            self._iteration.tolerance if tolerance is None else tolerance,
            self._iteration.max_iterations if max_iterations is None else max_iterations,
        )
        return self._minimise(fixed, target, linear, iteration)

    def _minimise(
        self, fixed: Tensor, target: Tensor, linear: Tensor | None, iteration: Iteration
    ) -> ConstrainedMinimum:
        """Implement `minimise` for this structure; by default by conjugate gradients on the smaller side.

        With S the free coordinates: H_SS x_S = −H_SC x_C − c_S (free side), or, with c = 0,
        x = Σ_{:C} (Σ_CC)⁻¹ x_C (fixed side), preconditioned by Σ_SS and by diag Σ_CC. With a start or a linear term
        the free side is used.

        Args:
            fixed: (n,) bool, C.
            target: (n,), of the operator's type; the values on C, zero elsewhere.
            linear: c, (n,), of any type, or None.
            iteration: for iterative solves; exact ones ignore it.
        """
        if linear is not None:
            linear = linear.to(self.dtype)
        free_side = self.has_direct_solve and (
            linear is not None or iteration.start is not None or int(fixed.count_nonzero()) > self.size // 2
        )
        side = self._minimise_free if free_side else self._minimise_fixed
        solution, report = side(fixed, target, linear, iteration)
        report.accepted(iteration.tolerance)
        return ConstrainedMinimum(solution, report.iterations, report.residual)

    def _minimise_free(
        self, fixed: Tensor, target: Tensor, linear: Tensor | None, iteration: Iteration
    ) -> tuple[Tensor, ConjugateGradients]:
        free = (~fixed).to(self.dtype)
        right = -self.solve(target) if linear is None else -(self.solve(target) + linear)
        report = conjugate_gradients(
            lambda v: free * self.solve(free * v),
            free * right,
            # H_SS Σ_SS is the identity except for a part of rank |C| with eigenvalues of at least one. With diag H
            # as preconditioner, layers with little damping take up to ten times as many iterations.
            preconditioner=lambda v: free * (self @ v),
            start=None if iteration.start is None else free * iteration.start,
            tolerance=iteration.tolerance,
            max_iterations=iteration.max_iterations,
        )
        return torch.where(fixed, target, report.solution), report

    def _minimise_fixed(
        self, fixed: Tensor, target: Tensor, linear: Tensor | None, iteration: Iteration
    ) -> tuple[Tensor, ConjugateGradients]:
        held = fixed.to(self.dtype)
        offset = torch.zeros_like(target) if linear is None else -(self @ linear)
        scale = held / self.diagonal()
        report = conjugate_gradients(
            lambda v: held * (self @ (held * v)),
            held * (target - offset),
            preconditioner=lambda v: scale * v,
            tolerance=iteration.tolerance,
            max_iterations=iteration.max_iterations,
        )
        return torch.where(fixed, target, offset + self @ report.solution), report

    def _checked(self, X: Tensor) -> Tensor:
        if X.dim() not in (1, 2) or X.shape[0] != self.size:
            raise ValueError(f"({self.size},) or ({self.size}, k) was needed, {tuple(X.shape)} was given")
        return X


def padded(blocks: Tensor, index: Tensor) -> Tensor:
    """Blocks (m, B, B) with the identity's rows and columns where index (m, B) is −1."""
    surplus = index < 0
    if not bool(surplus.any()):
        return blocks
    clean = blocks.masked_fill(surplus[:, :, None] | surplus[:, None, :], 0.0)
    return clean + torch.diag_embed(surplus.to(blocks.dtype))


def missing_damping(matrices: Tensor, pivot: float) -> str:
    """Advice for matrices (m, B, B) whose Cholesky factorisation failed: the end of an error message.

    Adding 2 (|λmin| + pivot · λmax), the largest over the matrices, to their diagonals makes the smallest pivot larger
    than `pivot` times the largest.
    """
    matrices = matrices.double()
    if not bool(matrices.isfinite().all()):
        return "they hold numbers that are not finite: check the data, the loss and the weights"
    spectra = torch.linalg.eigvalsh(matrices)
    least = 2 * (spectra[:, 0].abs() + pivot * spectra[:, -1].clamp_min(torch.finfo(torch.float64).tiny))
    return (
        f"the least eigenvalue is {float(spectra.min()):.1e} beside {float(spectra.max()):.1e}, the largest: raise the "
        f"damping by at least {float(least.max()):.1e}, in absolute terms"
    )


def cholesky(blocks: Tensor) -> Tensor:
    """Lower Cholesky factors of blocks (m, B, B).

    Raises:
        CurvatureError: a block is not positive definite to RELATIVE_PIVOT.
    """
    factor, failed = torch.linalg.cholesky_ex(blocks)
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    bad = (failed > 0) | ~(pivots.amin(1) > RELATIVE_PIVOT * pivots.amax(1))
    if bool(bad.any()):
        pivot = max(RELATIVE_PIVOT, blocks.shape[1] * torch.finfo(blocks.dtype).eps)
        raise CurvatureError(
            f"{int(bad.sum())} of {len(blocks)} curvature blocks are not positive definite to working precision; "
            + missing_damping(blocks[bad], pivot)
        )
    return factor
