"""The direct sum of operators, one for each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from sparsekit.linalg.operator import ConstrainedMinimum, Iteration, LinearOperator, padded


class DirectSum(LinearOperator):
    """Operators on consecutive stretches of Rⁿ, independent of one another: one for each layer."""

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
        """By each part."""
        stretches = zip(self.parts, kept.split(self._sizes), strict=True)
        return DirectSum([part.conditioned(k) for part, k in stretches])

    def stretches(self) -> Sequence[int]:
        return [length for part in self.parts for length in part.stretches()]

    def blocks(self, index: Tensor) -> Tensor:
        return gathered(index, self._placed(), LinearOperator.blocks)

    def inverse_blocks(self, index: Tensor) -> Tensor:
        return gathered(index, self._placed(), LinearOperator.inverse_blocks)

    def conditioned_blocks(self, index: Tensor) -> Tensor:
        """By each part."""
        return gathered(index, self._placed(), LinearOperator.conditioned_blocks)

    def _placed(self) -> Iterator[tuple[slice, LinearOperator]]:
        start = 0
        for part, size in zip(self.parts, self._sizes, strict=True):
            yield slice(start, start + size), part
            start += size

    def _minimise(
        self, fixed: Tensor, target: Tensor, linear: Tensor | None, iteration: Iteration
    ) -> ConstrainedMinimum:
        """Part by part, so that each takes its smaller side and its own number of iterations."""
        minima = [
            part.minimise(f, v, c, start=s, tolerance=iteration.tolerance, max_iterations=iteration.max_iterations)
            for part, f, v, c, s in zip(
                self.parts,
                fixed.split(self._sizes),
                target.split(self._sizes),
                self._split(linear),
                self._split(iteration.start),
                strict=True,
            )
        ]
        return ConstrainedMinimum(
            torch.cat([m.solution for m in minima]),
            max(m.iterations for m in minima),
            max(m.residual for m in minima),
        )


def gathered(
    index: Tensor, parts: Iterable[tuple[slice, LinearOperator]], of: Callable[[LinearOperator, Tensor], Tensor]
) -> Tensor:
    """Principal blocks of a direct sum, part by part, by the method `of` of `LinearOperator`."""
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
