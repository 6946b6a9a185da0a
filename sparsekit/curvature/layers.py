"""Per-example gradients of one pass, parameter by parameter, as the factors that they are made of.

For an example n of a batch, the gradient of a layer's weight is G_n = Σ_t d_nt a_ntᵀ, with inputs a_nt (b, T, in) and
output gradients d_nt (b, T, out) at T positions. Sums over n of functions of G_n need no G_n where T is one:
Σ G_n² = (d²)ᵀ(a²), Σ G_nᵀG_n = Σ |d_n|² a_n a_nᵀ, Σ (Vᵀ G_n U)² = ((dV)²)ᵀ((aU)²). Otherwise that way is taken which
multiplies less; at most SLICE numbers of G_n exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from sparsekit.curvature.hooked_layers import HookedLayer
from sparsekit.linalg import kronecker_product

#: Numbers of per-example gradients that are formed at a time.
SLICE = 1 << 22


class LayerGradients:
    """The gradients G_n (b, *shape) of one parameter for the b examples of a batch.

    Args:
        name: of the parameter.
        shape: of the parameter.
        uses: (layer, a, d) for each call of a layer with a rule; or
        rows: the gradients themselves (b, *shape), for all other parameters.
        examples: b.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        examples: int,
        *,
        uses: Sequence[tuple[HookedLayer, Tensor, Tensor]] = (),
        rows: Tensor | None = None,
    ) -> None:
        self.name, self.shape, self.examples = name, tuple(shape), examples
        self._uses, self._rows = list(uses), rows

    def __len__(self) -> int:
        return self.examples

    # -- rows ------------------------------------------------------------------------------------------------
    def rows(self, examples: slice | Tensor | None = None) -> Tensor:
        """G_n (b', *shape) of all examples or of some."""
        if self._rows is not None:
            return self._rows if examples is None else self._rows[examples]
        total = None
        some = slice(None) if examples is None else examples
        for layer, a, d in self._uses:
            rule = layer.rule.weight if self.name == layer.weight else layer.rule.bias
            found = rule(layer.module, a[some], d[some])
            total = found if total is None else total.add_(found)
        assert total is not None
        return total

    def slices(self) -> Iterator[Tensor]:
        """`rows`, for as many examples at a time as SLICE allows."""
        step = max(1, SLICE // max(1, prod(self.shape)))
        for first in range(0, self.examples, step):
            yield self.rows(slice(first, first + step))

    def parts(self) -> Iterator[Tensor]:
        """All tensors that the gradients are made of."""
        yield from (part for _, a, d in self._uses for part in (a, d))
        yield from () if self._rows is None else (self._rows,)

    # -- factors -----------------------------------------------------------------------------------------------
    @property
    def positions(self) -> int:
        """T, summed over all uses; 0 where the gradients are not products of factors."""
        found = [layer.rule.positions(d) if self.name == layer.weight else 0 for layer, _, d in self._uses]
        return sum(found) if all(found) else 0

    @property
    def matrices(self) -> tuple[int, int, int]:
        """(groups, out/groups, in/groups): the parameter as matrices, one for each group of a layer's channels."""
        groups = int(getattr(self._uses[0][0].module, "groups", 1)) if self._uses else 1
        return groups, self.shape[0] // groups, prod(self.shape[1:])

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (groups, b, T, in/groups) and D (groups, b, T, out/groups), G_n = D_nᵀ A_n in each group.

        The positions of all uses of the layer follow one another.

        Raises:
            ValueError: the gradients are not products of factors, see `positions`.
        """
        pairs = [
            layer.rule.factors(layer.module, a, d)
            for layer, a, d in self._uses
            if self.name == layer.weight and layer.rule.factors is not None
        ]
        if not pairs or len(pairs) < len(self._uses):
            raise ValueError(
                f"the gradients of '{self.name}' are not products of a layer's inputs and output gradients"
            )
        A, D = (torch.cat(parts, 2) if len(parts) > 1 else parts[0] for parts in zip(*pairs, strict=True))
        return A, D

    # -- sums over the examples ----------------------------------------------------------------------------------
    def squares(self) -> Tensor:
        """Σ_n G_n², (*shape): N times the diagonal of F."""
        if self.positions == 1:
            A, D = (part[:, :, 0].square() for part in self.factors())
            return (D.mT @ A).reshape(self.shape)
        return _summed(rows.square().sum(0) for rows in self.slices())

    def squared_norms(self) -> Tensor:
        """Σ_n |G_n[o]|² for each output o, (shape[0],): the trace of each output's share of N F."""
        if self.positions == 1:
            A, D = self.factors()
            return (D.square() * A.square().sum(3, keepdim=True)).sum((1, 2)).flatten()
        return _summed(rows.square().sum(0).reshape(self.shape[0], -1).sum(1) for rows in self.slices())

    def mode_moment(self, shape: Sequence[int], mode: int) -> Tensor:
        """Σ_n of G_n's second moment along one mode, summed over all others: (g, d, d).

        For a matrix G_n (out, in): Σ_n G_n G_nᵀ for mode 0, Σ_n G_nᵀ G_n for mode 1.

        Args:
            shape: (g, d_1, …, d_m), how G_n is seen.
            mode: from 0 to m − 1.
        """
        factored = self._factored_moment(mode) if tuple(shape) == self.matrices else None
        if factored is not None:
            return factored
        d, others = shape[mode + 1], [axis for axis in range(2, len(shape) + 1) if axis != mode + 2]

        def moment(G: Tensor) -> Tensor:
            if mode == len(shape) - 2:  # either way without a copy where no groups and no other modes are between
                flat = G.permute(1, 0, *others, mode + 2).reshape(shape[0], -1, d)
                return flat.mT @ flat
            wide = G.permute(1, mode + 2, 0, *others).reshape(shape[0], d, -1)
            return wide @ wide.mT

        return _summed(moment(rows.reshape(-1, *shape)) for rows in self.slices())

    def _factored_moment(self, mode: int) -> Tensor | None:
        """`mode_moment` of matrices from their factors; None where that multiplies more than with rows."""
        T, (_, out, inner) = self.positions, self.matrices
        near, far = (inner, out) if mode == 1 else (out, inner)  # the sides that stays and that is summed over
        if not T or T * T * (near + far) + T * near * near > T * near * far + near * near * far:
            return None
        A, D = self.factors()
        X, Y = (A, D) if mode == 1 else (D, A)
        if T == 1:
            X = (X * Y.square().sum(3, keepdim=True).sqrt())[:, :, 0]
            return X.mT @ X
        return X.flatten(1, 2).mT @ ((Y @ Y.mT) @ X).flatten(1, 2)  # Σ_n X_nᵀ (Y_n Y_nᵀ) X_n

    def squares_in_basis(self, shape: Sequence[int], factors: Sequence[Tensor | None]) -> Tensor:
        """Σ_n ((U_1 ⊗ … ⊗ U_m)ᵀ G_n)², (g, d_1, …, d_m).

        Args:
            shape: (g, d_1, …, d_m), how G_n is seen.
            factors: U_i (g, d_i, d_i), or None for the identity.
        """
        T, (_, out, inner) = self.positions, self.matrices
        if T and tuple(shape) == self.matrices and T * (out**2 + inner**2) <= out * inner * (out + inner):
            turned = [
                X if U is None else X @ U[:, None] for X, U in zip(reversed(self.factors()), factors, strict=True)
            ]
            if T == 1:
                D, A = (X[:, :, 0].square() for X in turned)
                return D.mT @ A
            D, A = turned
            step = max(1, SLICE // (out * inner))
            pairs = zip(D.split(step, 1), A.split(step, 1), strict=True)
            return _summed((d.mT @ a).square_().sum(1) for d, a in pairs)
        rotated = (kronecker_product(factors, rows.reshape(-1, *shape), transposed=True) for rows in self.slices())
        return _summed(part.square().sum(0) for part in rotated)

    def product(self, V: Tensor) -> Tensor:
        """Σ_n g_n g_nᵀ V for V (size, k): N times the parameter's own block of F, applied to V."""
        flat = (rows.flatten(1) for rows in self.slices())
        return _summed(rows.mT @ (rows @ V) for rows in flat)


def _summed(parts: Iterable[Tensor]) -> Tensor:
    """The sum of fresh tensors, one at a time."""
    rest = iter(parts)
    total = next(rest)
    for part in rest:
        total += part
    return total
