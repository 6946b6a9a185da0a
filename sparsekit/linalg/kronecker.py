"""Operators with Kronecker structure on arrays of any number of modes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from sparsekit.linalg.operator import LinearOperator, padded

#: A factor of each mode, (g, d_i, d_i), or None for the identity.
Factors = Sequence[Tensor | None]

#: Largest number of entries in a temporary tensor of `KroneckerDiagonal.blocks`.
_SLICE = 1 << 26

#: Principal blocks of at most so many rows are computed row by row; the work grows with the square of the rows.
MOST_ROWS = 32

#: Largest amplification of rounding errors at which float32 keeps about three digits.
SINGLE_PRECISION_RANGE = 1e4


def kronecker_product(factors: Factors, X: Tensor, *, transposed: bool = False) -> Tensor:
    """(U_1 ⊗ … ⊗ U_m) X, group by group, without forming it; differentiable.

    Args:
        factors: U_i (g, d_i, d_i), or None for the identity.
        X: (k, g, d_1, …, d_m).
        transposed: with every U_i transposed.
    """
    k, groups, *modes = X.shape
    for i, U in enumerate(factors):
        if U is None:
            continue
        before, d, after = prod(modes[:i]), modes[i], prod(modes[i + 1 :])
        if groups == 1:  # a single matrix needs no batch dimension, for which torch would copy it
            matrix = U[0].mT if transposed else U[0]
            X = X.reshape(k * before, d) @ matrix.mT if after == 1 else matrix @ X.reshape(k * before, d, after)
        else:
            matrix = (U.mT if transposed else U)[:, None]
            X = matrix @ X.reshape(k, groups, before, d, after)
        X = X.reshape(k, groups, *modes)
    return X


def kronecker_sandwich(factors: Factors, q: Tensor, outer: Tensor | None, X: Tensor) -> Tensor:
    """O (U_1 ⊗ … ⊗ U_m) diag(q) (U_1 ⊗ … ⊗ U_m)ᵀ O X, group by group, for X (n, k); differentiable.

    Args:
        factors: U_i (g, d_i, d_i), or None for the identity.
        q: (g, d_1, …, d_m), n entries.
        outer: diag O, of the same shape; None for O = I.
        X: (n, k), each column row-major over (g, d_1, …, d_m).
    """
    Y = X.mT.reshape(X.shape[1], *q.shape)
    Y = Y if outer is None else outer * Y
    Y = kronecker_product(factors, q * kronecker_product(factors, Y, transposed=True))
    Y = Y if outer is None else outer * Y
    return Y.reshape(X.shape[1], -1).mT


class KroneckerDiagonal(LinearOperator):
    """Σ = O (U_1 ⊗ … ⊗ U_m) diag(q) (U_1 ⊗ … ⊗ U_m)ᵀ O for each of g groups, on row-major arrays (d_1, …, d_m).

    With two modes, orthogonal factors and O = I this is EKFAC (George et al., 2018): the eigenvectors of two Kronecker
    factors, with eigenvalues of their own. With q of rank one it is a plain Kronecker product.

    Args:
        factors: U_i (g, d_i, d_i), invertible, or None for the identity; one for each mode.
        q: (g, d_1, …, d_m) > 0.
        outer: diag O, (g, d_1, …, d_m) > 0; None for O = I.
        orthogonal: whether the factors are orthogonal, which is not checked; they are then not inverted.
    """

    def __init__(self, factors: Factors, q: Tensor, *, outer: Tensor | None = None, orthogonal: bool) -> None:
        super().__init__(q.numel(), q.dtype, q.device)
        if len(factors) != q.dim() - 1:
            raise ValueError(f"q {tuple(q.shape)} has {q.dim() - 1} modes, {len(factors)} factors were given")
        self.factors, self.q, self.outer = tuple(factors), q, outer
        self._inverses = self.factors if orthogonal else tuple(None if U is None else _dual(U) for U in factors)

    def _matmul(self, X: Tensor) -> Tensor:
        return kronecker_sandwich(self.factors, self.q, self.outer, X)

    def _solve(self, B: Tensor) -> Tensor:
        outer = None if self.outer is None else self.outer.reciprocal()
        return kronecker_sandwich(self._inverses, self.q.reciprocal(), outer, B)

    @staticmethod
    def _diagonal(factors: Factors, q: Tensor, outer: Tensor | None) -> Tensor:
        found = kronecker_product([None if U is None else U.square() for U in factors], q[None])[0]
        return (found if outer is None else outer.square() * found).reshape(-1)

    def diagonal(self) -> Tensor:
        """O² (U_1∘U_1 ⊗ … ⊗ U_m∘U_m) q, for any factors."""
        return self._diagonal(self.factors, self.q, self.outer)

    def inverse_diagonal(self) -> Tensor:
        """The same with O⁻¹, U_i⁻ᵀ and 1/q."""
        outer = None if self.outer is None else self.outer.reciprocal()
        return self._diagonal(self._inverses, self.q.reciprocal(), outer)

    def marginal(self, mode: int) -> Tensor:
        """The partial trace of H = Σ⁻¹ over all modes but one, (g, d, d).

        Raises:
            ValueError: there is an outer diagonal, which couples the modes.
        """
        if self.outer is not None:
            raise ValueError("an operator with an outer diagonal has no marginal in closed form")
        columns = [  # what a column of the other factors adds to their trace
            None if i == mode or U is None else U.square().sum(-2).diag_embed() for i, U in enumerate(self._inverses)
        ]
        weighted = kronecker_product(columns, self.q.reciprocal()[None])[0]
        spectrum = weighted.sum([i + 1 for i in range(len(self.factors)) if i != mode])  # (g, d)
        V = self._inverses[mode]
        return spectrum.diag_embed() if V is None else (V * spectrum[:, None]) @ V.mT

    def stretches(self) -> Sequence[int]:
        return [self.size // len(self.q)] * len(self.q)

    def blocks(self, index: Tensor) -> Tensor:
        """Principal blocks: from its spectrum within one row, row by row for a few rows, else pair by pair."""
        return self._principal(self.factors, self.q, self.outer, index)

    def inverse_blocks(self, index: Tensor) -> Tensor:
        """The same with O⁻¹, U_i⁻ᵀ and 1/q."""
        outer = None if self.outer is None else self.outer.reciprocal()
        return self._principal(self._inverses, self.q.reciprocal(), outer, index)

    def conditioned_blocks(self, index: Tensor) -> Tensor:
        """For whole rows without an inversion: H_oo = V diag(h_o) Vᵀ, so that (H_oo)⁻¹ = V⁻ᵀ diag(1/h_o) V⁻¹.

        Eliminating the others amplifies the rounding error of Σ_ii by Σ_ii H_ii. Where that is more than
        SINGLE_PRECISION_RANGE, the result is computed in float64.
        """
        rows, width = index[:, 0] // self._width, self._width
        places = torch.arange(index.shape[1], device=index.device)
        if index.shape[1] != width or not bool((index == rows[:, None] * width + places).all()):
            return super().conditioned_blocks(index)
        h = self._spectra(self._inverses, self.q.reciprocal(), rows)
        if all(U is None for U in self.factors[1:]):
            return self._scaled(torch.diag_embed(h.reciprocal()), self.outer, index)
        there, back = self._rest(self.factors, index), self._rest(self._inverses, index)
        diagonals = [(V.square() @ x[..., None])[..., 0] for V, x in ((there, h.reciprocal()), (back, h))]
        if float((diagonals[0] * diagonals[1]).max()) > SINGLE_PRECISION_RANGE:
            there, h = there.double(), h.double()
        return self._scaled((there / h[:, None]) @ there.mT, self.outer, index)

    def _principal(self, factors: Factors, q: Tensor, outer: Tensor | None, index: Tensor) -> Tensor:
        first = index.amax(1, keepdim=True).clamp_min(0)
        clean = torch.where(index < 0, first, index)  # so that padding adds no row to a block
        rows = clean // self._width
        if bool((rows == rows[:, :1]).all()):
            found = self._inside(factors, self._spectra(factors, q, rows[:, 0]), clean)
        else:
            by_rows = len(factors) == 2 and None not in factors
            ranks = _ranks(rows) if by_rows else clean
            few = by_rows and int(ranks.max()) < MOST_ROWS
            found = self._by_rows(factors, q, clean, ranks) if few else self._by_pairs(factors, q, clean)
        return padded(self._scaled(found, outer, clean), index)

    @property
    def _width(self) -> int:
        """The number of coordinates in a row, that is at one index of the first mode."""
        return prod(self.q.shape[2:])

    @staticmethod
    def _scaled(blocks: Tensor, outer: Tensor | None, index: Tensor) -> Tensor:
        if outer is None:
            return blocks
        scale = outer.reshape(-1)[index]
        return blocks * scale[:, :, None] * scale[:, None, :]

    def _spectra(self, factors: Factors, q: Tensor, rows: Tensor) -> Tensor:
        """Σ_k U_1[o,k]² q[k, ·] for rows o (m,), counted over all groups: (m, width), in the other factors' basis."""
        U, flat = factors[0], q.reshape(*q.shape[:2], -1)
        group, row = rows // q.shape[1], rows % q.shape[1]
        if U is None:
            return flat[group, row]
        out = flat.new_empty(len(rows), self._width)
        for g in group.unique():
            mine = group == g
            out[mine] = U[g, row[mine]].square() @ flat[g]
        return out

    def _inside(self, factors: Factors, spectra: Tensor, index: Tensor) -> Tensor:
        """V[c] diag(spectrum) V[d]ᵀ for the coordinates c, d (m, B) of one row a block, V = U_2 ⊗ … ⊗ U_m."""
        if all(U is None for U in factors[1:]):
            return torch.diag_embed(spectra.gather(1, index % self._width))
        V = self._rest(factors, index)
        return (V * spectra[:, None]) @ V.mT

    def _rest(self, factors: Factors, index: Tensor) -> Tensor:
        """U_2 ⊗ … ⊗ U_m at the coordinates of one row a block: (m, B, width), (B, width) where the same for all."""
        place, group = index % self._width, index[:, :1] // (self._width * self.q.shape[1])
        if bool((group == group[:1]).all()) and bool((place == place[:1]).all()):
            place, group = place[0], group[0]
        modes = self.q.shape[2:]
        V = self.q.new_ones(*place.shape, 1)
        for U, at, d in zip(factors[1:], torch.unravel_index(place, modes), modes, strict=True):
            rows = torch.nn.functional.one_hot(at, d).to(V) if U is None else U[group, at]
            V = (V[..., None] * rows[..., None, :]).flatten(-2)
        return V

    def _by_rows(self, factors: Factors, q: Tensor, index: Tensor, ranks: Tensor) -> Tensor:
        """Blocks of matrices: between row r and row s, V[c] diag((U[r] ∘ U[s]) q) V[d]ᵀ for columns c and d.

        Args:
            factors: U and V.
            q: of the same groups.
            index: (m, B).
            ranks: (m, B), the rows numbered from 0 within each block.
        """
        groups, rows, columns = self.q.shape
        U, V = factors
        assert U is not None and V is not None
        out = torch.zeros(*index.shape, index.shape[1], dtype=self.dtype, device=self.device)
        longest = max(1, _SLICE // (index.shape[1] * columns))
        for some in torch.arange(len(index), device=self.device).split(longest):
            row, rank = index[some] // columns, ranks[some]
            right = V[row // rows, index[some] % columns]  # (m, B, columns)
            members = [rank == r for r in range(int(rank.max()) + 1)]
            firsts = [row.gather(1, member.int().argmax(1, keepdim=True))[:, 0] for member in members]
            for a, here in enumerate(members):
                for b, there in enumerate(members[: a + 1]):
                    left = U[firsts[a] // rows, firsts[a] % rows] * U[firsts[b] // rows, firsts[b] % rows]
                    weights = left.new_zeros(len(some), columns)
                    for g in range(groups):
                        mine = (firsts[a] // rows == g) & (firsts[b] // rows == g)
                        weights[mine] = left[mine] @ q[g]
                    part = (right * here[:, :, None] * weights[:, None]) @ (right * there[:, :, None]).mT
                    out[some] += part if a == b else part + part.mT
        return out

    def _by_pairs(self, factors: Factors, q: Tensor, index: Tensor) -> Tensor:
        """Blocks entry by entry: each takes one contraction of the group's q with rows of the factors."""
        groups, *modes = self.q.shape
        within = prod(modes)
        group, place = index // within, torch.stack(torch.unravel_index(index % within, modes), -1)
        out = torch.zeros(*index.shape, index.shape[1], dtype=self.dtype, device=self.device)
        for a in range(index.shape[1]):
            for b in range(a + 1):
                for g in range(groups):
                    pairs = ((group[:, a] == g) & (group[:, b] == g)).nonzero()[:, 0]
                    for some in pairs.split(max(1, _SLICE * modes[0] // within)):
                        out[some, a, b] = out[some, b, a] = _between(factors, q, g, place[some, a], place[some, b])
        return out


def _between(factors: Factors, q: Tensor, group: int, left: Tensor, right: Tensor) -> Tensor:
    """Σ_j q_j Π_i U_i[l_i, j_i] U_i[r_i, j_i] within a group, for p pairs of places l, r (p, m): (p,)."""
    q = q[group]
    T = q.new_zeros(0)
    for i, U in enumerate(factors):
        here, there = left[:, i], right[:, i]
        if U is None:
            T = q[here] if i == 0 else T[torch.arange(len(here), device=T.device), here]
            T = T * (here == there).view(-1, *[1] * (T.dim() - 1))
            continue
        rows = U[group, here] * U[group, there]
        T = torch.tensordot(rows, q, 1) if i == 0 else torch.einsum("pi,pi...->p...", rows, T)
    return T


def _ranks(rows: Tensor) -> Tensor:
    """The rank, from 0, of each number in (m, B) among the distinct numbers of its row."""
    ordered, order = rows.sort(1)
    steps = torch.cat([torch.zeros_like(ordered[:, :1]), (ordered.diff(dim=1) > 0).to(ordered.dtype)], dim=1)
    return torch.empty_like(rows).scatter_(1, order, steps.cumsum(1))


def _dual(U: Tensor) -> Tensor:
    """U⁻ᵀ, by group."""
    return torch.linalg.inv(U.double()).mT.to(U.dtype).contiguous()
