"""The structures: diagonal, blocks, repeated blocks, Kronecker with an inner diagonal, direct sums, principal parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from sparsekit.linalg.iterative import conjugate_gradients
from sparsekit.linalg.operator import ConstrainedMinimum, LinearOperator, cholesky, padded


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
        CurvatureError: on use, where a block is not positive definite to RELATIVE_PIVOT.
    """

    def __init__(self, precision: Tensor, sizes: Sequence[int]) -> None:
        lengths = torch.tensor(sizes, device=precision.device)
        super().__init__(int(lengths.sum()), precision.dtype, precision.device)
        width = precision.shape[1]
        self._sizes = list(sizes)
        self._inside = torch.arange(width, device=self.device) < lengths[:, None]  # (m, B)
        self.precision = precision if bool(self._inside.all()) else _decoupled(~self._inside, precision)

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
        """Exact, by one Cholesky factor of H_SS a block."""
        return BlockDiagonal(_decoupled(self._scatter((~kept)[:, None])[..., 0], self.precision), self._sizes)

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
        """Exact: H_SS x_S = −H_SC x_C − c_S block by block, with C decoupled."""
        target = torch.where(fixed, values.to(self.dtype), 0.0)
        right = -self.solve(target) if linear is None else -(self.solve(target) + linear.to(self.dtype))
        right = torch.where(fixed, 0.0, right)
        factor = cholesky(_decoupled(self._scatter(fixed[:, None])[..., 0], self.precision))
        solution = torch.cholesky_solve(self._scatter(right[:, None]), factor)[self._inside][:, 0]
        return ConstrainedMinimum(torch.where(fixed, target, solution))


class RepeatedBlock(LinearOperator):
    """I_r ⊗ H_1 ⊕ … ⊕ I_r ⊗ H_g: the same precision for each of r rows, group after group.

    What layer-wise least squares has: the rows of a weight matrix do not couple, and all have the inputs' second
    moment as Hessian. With coordinates fixed every row has a system of its own; rows are then worked on in slices.

    Args:
        precision: (g, B, B), the blocks of H.
        repeats: r, rows of each.
        kept: (g·r·B,) bool; coordinates outside are decoupled, with the group's mean diagonal as their precision.
        slice_bytes: bound of the memory of a slice of rows.
    """

    def __init__(
        self, precision: Tensor, repeats: int, kept: Tensor | None = None, *, slice_bytes: int = 1 << 28
    ) -> None:
        groups, width, _ = precision.shape
        super().__init__(groups * repeats * width, precision.dtype, precision.device)
        self.precision, self.repeats, self.kept = precision, repeats, kept
        self._shared = BlockDiagonal(precision, [width] * groups) if kept is None else None
        self._scale = precision.diagonal(dim1=1, dim2=2).mean(1)  # (g,), of what stands in for decoupled coordinates
        self._bytes = slice_bytes
        self._slice = max(1, slice_bytes // (4 * width * width * precision.element_size()))

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
                    blocks = _decoupled(~kept[where].view(count, width), blocks, self._scale[group])
                yield where, BlockDiagonal(blocks, [width] * count)

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
        """Exact, by one Cholesky factor of H_SS a row, when it is used."""
        both = kept if self.kept is None else kept & self.kept
        return RepeatedBlock(self.precision, self.repeats, both, slice_bytes=self._bytes)

    def blocks(self, index: Tensor) -> Tensor:
        if self._shared is None:
            return _gathered(index, self._rows(self.kept), LinearOperator.blocks)
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
        """Exact, row by row."""
        parts = []
        for where, rows in self._rows(self.kept):
            c = None if linear is None else linear[where]
            parts.append(rows.minimise(fixed[where], values[where], c).solution)
        return ConstrainedMinimum(torch.cat(parts))


class Rescaled(LinearOperator):
    """Σ = S Σ₀ S with S = diag(s), s (n,) > 0: another operator in other units, exact where that one is."""

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
        """As the base's."""
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
        """As the base's."""
        s = self.s[index.clamp_min(0)]
        return padded(self.base.conditioned_blocks(index) * s[:, :, None] * s[:, None, :], index)

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
        """The base's, for x/s."""
        found = self.base.minimise(
            fixed,
            values.to(self.dtype) / self.s,
            None if linear is None else linear.to(self.dtype) * self.s,
            start=None if start is None else start / self.s,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )
        solution = torch.where(fixed, values.to(self.dtype), self.s * found.solution)
        return ConstrainedMinimum(solution, found.iterations, found.residual)


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

    def conditioned(self, kept: Tensor) -> DirectSum:
        """Each part's own."""
        stretches = zip(self.parts, kept.split(self._sizes), strict=True)
        return DirectSum([part.conditioned(k) for part, k in stretches])

    def stretches(self) -> Sequence[int]:
        return [length for part in self.parts for length in part.stretches()]

    def blocks(self, index: Tensor) -> Tensor:
        return _gathered(index, self._placed(), LinearOperator.blocks)

    def inverse_blocks(self, index: Tensor) -> Tensor:
        return _gathered(index, self._placed(), LinearOperator.inverse_blocks)

    def conditioned_blocks(self, index: Tensor) -> Tensor:
        """Each part's own."""
        return _gathered(index, self._placed(), LinearOperator.conditioned_blocks)

    def _placed(self) -> Iterator[tuple[slice, LinearOperator]]:
        start = 0
        for part, size in zip(self.parts, self._sizes, strict=True):
            yield slice(start, start + size), part
            start += size

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

        H = Σ⁻¹ is known by its products alone, so that its diagonal would take a solve for each coordinate.
        """
        return self._diagonal.reciprocal()

    def blocks(self, index: Tensor) -> Tensor:
        found, outside = self.base.blocks(index), ~self.kept[index.clamp_min(0)]
        diagonal = torch.diag_embed(found.diagonal(dim1=1, dim2=2) * outside)
        return found.masked_fill(outside[:, :, None] | outside[:, None, :], 0.0) + diagonal


def _gathered(
    index: Tensor, parts: Iterable[tuple[slice, LinearOperator]], of: Callable[[LinearOperator, Tensor], Tensor]
) -> Tensor:
    """Principal blocks of a direct sum from `of` its parts, one part at a time; `of` is a method of the base."""
    out: Tensor | None = None
    for where, part in parts:
        inside = (index >= where.start) & (index < where.stop)
        here = inside.any(1)
        if bool(here.any()):
            mine = inside[here]
            found = getattr(part, of.__name__)(torch.where(mine, index[here] - where.start, -1))
            if bool((inside | (index < 0)).all()):
                return found
            out = found.new_zeros(*index.shape, index.shape[1]) if out is None else out
            out = out.to(torch.promote_types(out.dtype, found.dtype))
            out[here] += found.to(out) * (mine[:, :, None] & mine[:, None, :])
    assert out is not None  # the parts cover all coordinates
    return padded(out, index)


def _decoupled(where: Tensor, blocks: Tensor, scale: Tensor | None = None) -> Tensor:
    """Blocks (m, B, B) without coupling to the coordinates at `where` (m, B), which get a diagonal of the same size.

    The size is `scale`, or the mean of the block's remaining diagonal, so that no pivot looks small beside a
    stand-in.
    """
    if scale is None:
        diagonal, left = blocks.diagonal(dim1=1, dim2=2), (~where).sum(1)
        mean = diagonal.masked_fill(where, 0.0).sum(1) / left.clamp_min(1)
        scale = torch.where((left > 0) & (mean > 0), mean, 1.0)[:, None]
    clean = blocks.masked_fill(where[:, :, None] | where[:, None, :], 0.0)
    clean.diagonal(dim1=1, dim2=2).add_(where * scale)
    return clean
