"""The part of Q of one tensor: its start, its product as a function of its parameters, and its operator.

The weights are `groups` arrays of shape (d_1, …, d_m) (see `structures`), and so are the gradient rows G_n. Q acts on
each array as O (U_1 ⊗ … ⊗ U_m) diag(q) (U_1 ⊗ … ⊗ U_m)ᵀ O, with U_i the identity for modes without a factor, and
O = I but for structure 'outer'. For a weight matrix: U ↦ U_1 (q ∘ (U_1ᵀ U U_2)) U_2ᵀ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekit import CurvatureError
from sparsekit.curvature import LayerGradients, RunningSum
from sparsekit.linalg import (
    BlockDiagonal,
    Diagonal,
    KroneckerDiagonal,
    LinearOperator,
    kronecker_product,
    kronecker_sandwich,
)
from sparsekit_fishleg.structures import Structure, View

#: The sums over a pass, by name.
Totals = defaultdict[str, RunningSum]

#: Structures whose q is a product of one vector for each mode.
RANK_ONE = ("kronecker", "outer")


class Parts(NamedTuple):
    """The components of a tensor's Q: U_i by mode, q, and the diagonal of O, None for the identity."""

    factors: list[Tensor | None]
    q: Tensor
    outer: Tensor | None

    def detached(self) -> Parts:
        """The same, as constants."""
        factors = [None if U is None else U.detach() for U in self.factors]
        return Parts(factors, self.q.detach(), None if self.outer is None else self.outer.detach())


class Block:
    """The learned inverse Fisher of one tensor, n_l weights.

    It starts in the Kronecker-factored eigenbasis, or at I/γ. The bases are the eigenvectors of the second moments of
    the gradient rows along each mode, for matrices E G Gᵀ and E Gᵀ G, and D = E ((U_1 ⊗ … ⊗ U_m)ᵀ G)² their own second
    moments there (as in EKFAC; George et al., 2018). Training moves the factors multiplicatively, U_i ← U_i M_i with
    M_i = I at the start, so that one step size suits factors of any scale.

    The state, i counting modes: `basis{i}` (g, d_i, d_i) and `moment{i}` (g, d_i), eigenvectors and eigenvalues of the
    second moments; `spectrum`, D; `q`; both (g, d_1, …, d_m). Where they apply: `factor{i}`, U_i once it is no longer
    the basis; `log_scale{i}` (g, d_i), the logarithms whose sum is that of a q of rank one; `outer`, the diagonal of O.

    Args:
        view: how the tensor is seen.
        structure: 'kronecker' and 'outer': q is a product of one vector for each mode; 'outer': O is free too;
            'frozen': the factors stay eigenvectors; anything else: q and the factors are free.

    Attributes:
        size: n_l.
        shape: (g, d_1, …, d_m).
        state: see above.
        moments: name -> tensor, the optimiser's, for the parameters that led to this Q; empty where none are kept.
    """

    def __init__(self, view: View, structure: Structure) -> None:
        self.view, self.structure, self.size = view, structure, view.size
        self.shape = (view.groups, *view.modes)
        self.rank_one = structure in RANK_ONE and any(view.factored)
        self.state: dict[str, Tensor] = {}
        self.moments: dict[str, Tensor] = {}

    @property
    def factored(self) -> list[int]:
        """The modes with a factor."""
        return [i for i, known in enumerate(self.view.factored) if known]

    def _factors(self, kind: str = "factor") -> list[Tensor | None]:
        """U_i by mode; for structures without factors of their own the eigenvectors."""
        return [
            self.state.get(f"{kind}{i}", self.state[f"basis{i}"]) if known else None
            for i, known in enumerate(self.view.factored)
        ]

    # -- starts ------------------------------------------------------------------------------------------
    def identity(self, damping: float, like: Tensor) -> None:
        """Start from Q = I/γ."""
        groups, modes = self.view.groups, self.view.modes
        for i in self.factored:
            eye = torch.eye(modes[i], dtype=like.dtype, device=like.device)
            self.state[f"basis{i}"] = eye.repeat(groups, 1, 1)
        self._set_q(like.new_full(self.shape, 1 / damping))
        if self.structure == "outer" and self.rank_one:
            self.state["outer"] = like.new_ones(self.shape)

    def gather_bases(self, gradients: LayerGradients, totals: Totals) -> None:
        """Add the gradients of a batch to the sums from which the bases come."""
        gradients.add_moments(self.shape, {i: totals[f"moment{i}"] for i in self.factored})

    def set_bases(self, totals: Totals, count: int, decay: float, dtype: torch.dtype) -> None:
        """Mix the sums over `count` examples into the moments and diagonalise these; the sums are used up."""
        turns: list[Tensor | None] = [None] * len(self.view.modes)
        for i in self.factored:
            old, moment = self.state.get(f"basis{i}"), totals.pop(f"moment{i}").mean(count)
            if old is not None and f"moment{i}" in self.state:
                wide = old.double()
                moment = (1 - decay) * moment + decay * (wide * self.state[f"moment{i}"].double()[:, None]) @ wide.mT
            values, vectors = torch.linalg.eigh(moment)
            # contiguous: products must not depend on whether a state was saved and loaded in between
            new = vectors.to(dtype).contiguous()
            turns[i] = None if old is None else (new.mT @ old).square_()
            self.state[f"basis{i}"], self.state[f"moment{i}"] = new, values.to(dtype)
        if "spectrum" in self.state:
            # The earlier model of F, seen in the new basis: its diagonal there.
            self.state["spectrum"] = kronecker_product(turns, self.state["spectrum"][None])[0]

    def gather_spectrum(self, gradients: LayerGradients, totals: Totals) -> None:
        """Add the gradients of a batch to the sum of squares in the present basis."""
        gradients.add_squares_in_basis(self.shape, self._factors("basis"), totals["spectrum"])

    def set_spectrum(self, totals: Totals, count: int, decay: float, dtype: torch.dtype) -> None:
        """Mix the sum of squares over `count` examples into the spectrum D; the sum is used up."""
        new, old = totals.pop("spectrum").mean(count).to(dtype), self.state.get("spectrum")
        self.state["spectrum"] = new if old is None else decay * old + (1 - decay) * new

    def closed_form(self, damping: float) -> None:
        """Q = 1/(D + γ), the minimiser of the auxiliary loss over q in the basis of the spectrum.

        A q of rank one is its best fit in the logarithm; 'outer' then gives Q the diagonal that the full q would have.
        """
        for i in self.factored:
            self.state.pop(f"factor{i}", None)
        full = (self.state["spectrum"] + damping).reciprocal()
        self._set_q(full)
        if self.structure == "outer" and self.rank_one:
            squares = [None if U is None else U.square() for U in self._factors("basis")]
            wanted, got = (kronecker_product(squares, q[None])[0] for q in (full, self.state["q"]))
            self.state["outer"] = (wanted / got).sqrt()

    def _set_q(self, q: Tensor) -> None:
        if not self.rank_one:
            self.state["q"] = q
            return
        log_q, m = q.log(), len(self.view.modes)
        level = log_q.flatten(1).mean(1)
        for i in range(m):
            others = [axis for axis in range(1, m + 1) if axis != i + 1]
            mean = log_q.mean(others) if others else log_q
            self.state[f"log_scale{i}"] = mean - level[:, None] * ((m - 1) / m)
        self.state["q"] = self._q_of([self.state[f"log_scale{i}"] for i in range(m)])

    def _q_of(self, log_scales: Sequence[Tensor]) -> Tensor:
        total = log_scales[0].new_zeros(())
        for i, scale in enumerate(log_scales):
            total = total + scale.view(len(scale), *[-1 if j == i else 1 for j in range(len(log_scales))])
        return total.exp()

    # -- training ----------------------------------------------------------------------------------------
    def trainable(self) -> dict[str, Tensor]:
        """The parameters λ of Q, as fresh leaves to be trained."""
        q, groups = self.state["q"], self.view.groups
        out = {}
        if self.structure != "frozen":
            for i in self.factored:
                eye = torch.eye(self.view.modes[i], dtype=q.dtype, device=q.device)
                out[f"factor{i}"] = eye.repeat(groups, 1, 1)
        if self.rank_one:
            out |= {f"log_scale{i}": self.state[f"log_scale{i}"].clone() for i in range(len(self.view.modes))}
        else:
            out["log_q"] = q.log()
        if "outer" in self.state:
            out["log_outer"] = self.state["outer"].log()
        return {name: tensor.requires_grad_(True) for name, tensor in out.items()}

    def parts(self, parameters: Mapping[str, Tensor]) -> Parts:
        """Factors, q and outer diagonal of Q(λ), differentiable in λ."""
        factors = [
            U @ parameters[f"factor{i}"] if U is not None and f"factor{i}" in parameters else U
            for i, U in enumerate(self._factors())
        ]
        if self.rank_one:
            q = self._q_of([parameters[f"log_scale{i}"] for i in range(len(self.view.modes))])
        else:
            q = parameters["log_q"].exp()
        return Parts(factors, q, parameters["log_outer"].exp() if "log_outer" in parameters else None)

    def product(self, parts: Parts, U: Tensor) -> Tensor:
        """Q U for U (n_l, k), differentiable in the components of Q."""
        return kronecker_sandwich(parts.factors, parts.q.view(self.shape), parts.outer, U)

    def absorb(self, parameters: Mapping[str, Tensor]) -> None:
        """Make trained parameters the state."""
        with torch.no_grad():
            factors, self.state["q"], outer = self.parts(parameters)
        for i, U in enumerate(factors):
            if U is not None and f"factor{i}" in parameters:
                self.state[f"factor{i}"] = U
        for i in range(len(self.view.modes) if self.rank_one else 0):
            self.state[f"log_scale{i}"] = parameters[f"log_scale{i}"].detach()
        if outer is not None:
            self.state["outer"] = outer

    # -- what it stands for ------------------------------------------------------------------------------
    def operator(self, fitted: float, damping: float) -> LinearOperator:
        """Q as an operator; `fitted` is the damping that q was fitted at.

        Raises:
            CurvatureError: another damping is asked of a structure that knows no spectrum.
        """
        q = self.state["q"]
        if damping != fitted:
            if self.rank_one:
                raise CurvatureError(
                    f"structure '{self.structure}' was fitted at damping {fitted:.1e} and knows no other; "
                    "use structure 'eigenbasis', or run again with the damping you want"
                )
            # 1/q − γ is the curvature that q stands for.
            q = ((q.reciprocal() - fitted).clamp_min(0) + damping).reciprocal()
        if not self.factored:
            return Diagonal(q.reshape(-1))
        turned = any(f"factor{i}" in self.state for i in self.factored)
        if len(self.view.modes) > 1:
            return KroneckerDiagonal(self._factors(), q, outer=self.state.get("outer"), orthogonal=not turned)
        (U,) = self._factors()
        assert U is not None
        dual = torch.linalg.inv(U.double()).mT.to(U.dtype) if turned else U
        dual = dual if "outer" not in self.state else dual / self.state["outer"][..., None]
        return BlockDiagonal.of_precision((dual / q[:, None]) @ dual.mT, [self.view.modes[0]] * self.view.groups)

    @property
    def factor_sizes(self) -> list[int]:
        """The number of entries in each factor."""
        return [self.view.groups * self.view.modes[i] ** 2 for i in self.factored]
