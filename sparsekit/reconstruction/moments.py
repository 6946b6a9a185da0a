"""Moments of a layer's inputs and targets, from which its regression is solved and its error computed."""

from __future__ import annotations

import torch
from torch import Tensor

#: A product XᵀX is computed in halves if half of its inputs are at least this many.
SMALLEST_GRAM = 96


class Moments:
    """Â = E x̂x̂ᵀ, C = E z x̂ᵀ and E zᵀBz over rows, by group, in float64; products are at least in float32."""

    def __init__(self, B: Tensor | None) -> None:
        self.count = 0
        self._B = B
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, X: Tensor, Z: Tensor) -> None:
        """Add inputs (g, rows, in) and targets (g, rows, out)."""
        with torch.autocast(X.device.type, enabled=False):
            X, Z = (part if part.dtype == torch.float64 else part.float() for part in (X, Z))
            weighted = Z if self._B is None else Z @ self._B.to(Z)
            found = _gram(X).double(), (Z.mT @ X).double(), (weighted * Z).sum(dtype=torch.float64)
        if self._sums is None:
            self._sums = found
        else:
            A, C, length = self._sums
            self._sums = A + found[0], C + found[1], length + found[2]
        self.count += X.shape[1]

    def means(self, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """(Â, C, E zᵀBz); with a `scale`, the last input, a constant one, is multiplied by it."""
        assert self._sums is not None
        A, C, length = (total / self.count for total in self._sums)
        if scale is not None:
            A[:, -1] *= scale
            A[:, :, -1] *= scale
            C[:, :, -1] *= scale
        return A, C, length

    def error(self, W: Tensor, scale: float | None) -> float:
        """E ‖W x̂ − z‖²_B / E ‖z‖²_B; NaN without any rows."""
        if not self.count:
            return float("nan")
        A, C, length = self.means(scale)
        part = W @ A - 2 * C
        part = part if self._B is None else self._B @ part
        error, squares = torch.stack([(part * W).sum() + length, length]).tolist()
        return max(error, 0.0) / squares if squares > 0 else 0.0


def _gram(X: Tensor) -> Tensor:
    """XᵀX by group; blocks below the diagonal are copied from above, which saves up to half of the products."""
    half = X.shape[-1] // 2
    if half < SMALLEST_GRAM:
        return X.mT @ X
    left, right = X[:, :, :half], X[:, :, half:]
    across = left.mT @ right
    return torch.cat([torch.cat([_gram(left), across], 2), torch.cat([across.mT, _gram(right)], 2)], 1)
