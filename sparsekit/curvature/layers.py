"""Per-example gradients of one pass, parameter by parameter, as the factors that they are made of.

For an example n of a batch, the gradient of a layer's weight is G_n = Σ_t d_nt a_ntᵀ, with inputs a_nt (b, T, in) and
output gradients d_nt (b, T, out) at T positions. Sums over n of functions of G_n need no G_n where T is one:
Σ G_n² = (d²)ᵀ(a²), Σ G_nᵀG_n = Σ |d_n|² a_n a_nᵀ, Σ (Vᵀ G_n U)² = ((dV)²)ᵀ((aU)²). Otherwise that way is taken which
multiplies less; at most SLICE numbers of G_n exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from sparsekit.curvature.hooked_layers import HookedLayer
from sparsekit.curvature.layer_rules import LAYER_RULES
from sparsekit.curvature.sums import ROWS, RunningSum
from sparsekit.linalg import kronecker_product
from sparsekit.problem.parameters import ParameterSpace

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

    def factors(self, examples: slice | None = None) -> tuple[Tensor, Tensor]:
        """A (groups, b', T, in/groups) and D (groups, b', T, out/groups), G_n = D_nᵀ A_n in each group.

        The positions of all uses of the layer follow one another.

        Raises:
            ValueError: the gradients are not products of factors, see `positions`.
        """
        some = slice(None) if examples is None else examples
        pairs = [
            layer.rule.factors(layer.module, a[some], d[some])
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
    def add_squares(self, total: RunningSum) -> None:
        """Add Σ_n G_n², (*shape): N times the diagonal of F."""
        if self.positions == 1 and self.matrices[0] == 1:
            A, D = (part[0, :, 0].square() for part in self.factors())
            total.add_product(D, A.reshape(len(A), -1))
            return
        total.add(_summed(rows.square().sum(0) for rows in self.slices()))

    def add_squared_norms(self, total: RunningSum) -> None:
        """Add Σ_n |G_n[o]|² for each output o, (shape[0],): the trace of each output's share of N F."""
        if self.positions == 1:
            A, D = self.factors()
            total.add((D.square() * A.square().sum(3, keepdim=True)).sum((1, 2)).flatten())
            return
        total.add(_summed(rows.square().sum(0).reshape(self.shape[0], -1).sum(1) for rows in self.slices()))

    def add_moments(self, shape: Sequence[int], totals: Mapping[int, RunningSum]) -> None:
        """Add Σ_n of G_n's second moment along each of some modes, summed over all others: (g, d, d) each.

        For a matrix G_n (out, in): Σ_n G_n G_nᵀ for mode 0, Σ_n G_nᵀ G_n for mode 1.

        Args:
            shape: (g, d_1, …, d_m), how G_n is seen.
            totals: by mode, from 0 to m − 1.
        """
        rest: dict[int, Tensor | None] = {}
        for mode, total in totals.items():
            if tuple(shape) == self.matrices and self._pays(mode):
                total.add_product(*self._moment_factors(mode))
            else:
                rest[mode] = None
        for rows in self.slices() if rest else ():
            G = rows.reshape(-1, *shape)
            for mode, known in rest.items():
                part = _moment(G, mode)
                rest[mode] = part if known is None else known.add_(part)
        for mode, found in rest.items():
            assert found is not None
            totals[mode].add(found)

    def _pays(self, mode: int) -> bool:
        """Whether the moment of matrices multiplies less with their factors than with rows."""
        T, (_, out, inner) = self.positions, self.matrices
        near, far = (inner, out) if mode == 1 else (out, inner)  # the side that stays, and the one that is summed over
        return T > 0 and T * T * (near + far) + T * near * near <= T * near * far + near * near * far

    def _moment_factors(self, mode: int) -> tuple[Tensor, Tensor]:
        """P and R (g, b·T, d) with PᵀR the moment: Σ_n X_nᵀ (Y_n Y_nᵀ) X_n."""
        A, D = self.factors()
        X, Y = (A, D) if mode == 1 else (D, A)
        if X.shape[2] == 1:
            X = (X * Y.square().sum(3, keepdim=True).sqrt())[:, :, 0]
            return X, X
        return X.flatten(1, 2), ((Y @ Y.mT) @ X).flatten(1, 2)

    def add_squares_in_basis(self, shape: Sequence[int], factors: Sequence[Tensor | None], total: RunningSum) -> None:
        """Add Σ_n ((U_1 ⊗ … ⊗ U_m)ᵀ G_n)², (g, d_1, …, d_m).

        Args:
            shape: (g, d_1, …, d_m), how G_n is seen.
            factors: U_i (g, d_i, d_i), or None for the identity.
            total: the sum.
        """
        T, (_, out, inner) = self.positions, self.matrices
        if T and tuple(shape) == self.matrices and T * (out**2 + inner**2) <= out * inner * (out + inner):
            D, A = (
                X if U is None else (X.flatten(1, 2) @ U).view_as(X)
                for X, U in zip(reversed(self.factors()), factors, strict=True)
            )
            if T == 1:
                total.add_product(D[:, :, 0].square(), A[:, :, 0].square())
                return
            step = max(1, SLICE // (out * inner))
            pairs = zip(D.split(step, 1), A.split(step, 1), strict=True)
            total.add(_summed((d.mT @ a).square_().sum(1) for d, a in pairs))
            return
        rotated = (kronecker_product(factors, rows.reshape(-1, *shape), transposed=True) for rows in self.slices())
        total.add(_summed(part.square().sum(0) for part in rotated))

    def product(self, V: Tensor) -> Tensor:
        """Σ_n g_n g_nᵀ V for V (size, k): N times the parameter's own block of F, applied to V."""
        if self.positions == 1:
            A, D = (X[:, :, 0] for X in self.factors())  # (g, b, in), (g, b, out)
            groups, out, inner = self.matrices
            k = V.shape[1]
            wide = (D @ V.reshape(groups, out, inner * k)).view(groups, len(self), inner, k)
            s = (A[:, :, None] @ wide)[:, :, 0]  # g_nᵀ V, (g, b, k)
            if groups > 1:
                s = s.sum(0, keepdim=True)
            back = D.mT @ (A[..., None] * s[:, :, None]).flatten(2)
            return back.view(-1, k)
        flat = (rows.flatten(1) for rows in self.slices())
        return _summed(rows.mT @ (rows @ V) for rows in flat)


def layer_gradients_memory(space: ParameterSpace, batch_size: int) -> int:
    """Bytes that passes and sums take at most, of a model in float32, besides activations and the sums themselves.

    These are the gradients of parameters without a rule, a slice of one parameter's gradients with its copies, and the
    factors that a running sum holds back.
    """
    whole = sum(info.size for info in space.parameters if info.layer is not None and info.layer not in LAYER_RULES)
    largest = max(min(batch_size * info.size, max(SLICE, info.size)) for info in space.parameters)
    sides = sum(info.shape[0] + info.size // info.shape[0] for info in space.parameters)
    return 4 * (3 * batch_size * whole + 4 * largest + (ROWS + batch_size) * sides)


def _moment(G: Tensor, mode: int) -> Tensor:
    """Σ_n of the second moment of G_n along a mode, for G (b, g, d_1, …, d_m): (g, d, d)."""
    groups, d, others = G.shape[1], G.shape[mode + 2], [axis for axis in range(2, G.dim()) if axis != mode + 2]
    if mode == G.dim() - 3:  # either way without a copy where no groups and no other modes are between
        flat = G.permute(1, 0, *others, mode + 2).reshape(groups, -1, d)
        return flat.mT @ flat
    wide = G.permute(1, mode + 2, 0, *others).reshape(groups, d, -1)
    return wide @ wide.mT


def _summed(parts: Iterable[Tensor]) -> Tensor:
    """The sum of fresh tensors, one at a time."""
    rest = iter(parts)
    total = next(rest)
    for part in rest:
        total += part
    return total
