"""One tensor's share of Q: how it starts, its product as a function of its parameters, and its operator.

A weight tensor is a matrix W (rows, columns): outputs by everything else. Its gradient rows G_n have the same
shape, and Q acts as U ↦ L (q ∘ (Lᵀ U R)) Rᵀ, that is Q = (L ⊗ R) diag(q) (L ⊗ R)ᵀ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from sparsekit import CurvatureError
from sparsekit.linalg import Diagonal, KroneckerDiagonal, LinearOperator


class Block(ABC):
    """The learned inverse Fisher of one tensor, n_l weights.

    Attributes:
        size: n_l.
        state: name -> tensor, what is known of F and the present Q.
        moments: name -> tensor, the optimiser's, for the parameters that led to this Q; empty where none are kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.state: dict[str, Tensor] = {}
        self.moments: dict[str, Tensor] = {}

    @abstractmethod
    def identity(self, damping: float, like: Tensor) -> None:
        """Start from Q = I/γ."""

    def gather_bases(self, rows: Tensor, totals: dict[str, Tensor]) -> None:  # noqa: B027 - a diagonal has none
        """Add rows (b, n_l) to the sums from which the bases come, in float64."""

    def set_bases(self, totals: dict[str, Tensor], count: int, decay: float, dtype: torch.dtype) -> None:  # noqa: B027
        """Mix the sums over `count` examples into what is known and diagonalise; the sums are used up."""

    @abstractmethod
    def gather_spectrum(self, rows: Tensor, totals: dict[str, Tensor]) -> None:
        """Add rows (b, n_l) to the sum of squares in the present basis, in float64."""

    def set_spectrum(self, totals: dict[str, Tensor], count: int, decay: float, dtype: torch.dtype) -> None:
        """Mix the sum of squares over `count` examples into the spectrum D; the sum is used up."""
        new = _mean(totals, "spectrum", count).to(dtype)
        self.state["spectrum"] = _mixed(self.state.get("spectrum"), new, decay)

    @abstractmethod
    def closed_form(self, damping: float) -> None:
        """Q = 1/(D + γ), the minimiser of the auxiliary loss over q in the basis of the spectrum."""

    @abstractmethod
    def trainable(self) -> dict[str, Tensor]:
        """The parameters λ of Q, as fresh leaves to be trained."""

    @abstractmethod
    def product(self, parameters: Mapping[str, Tensor], U: Tensor) -> Tensor:
        """Q(λ) U for U (n_l, k), differentiable in λ."""

    @abstractmethod
    def absorb(self, parameters: Mapping[str, Tensor]) -> None:
        """Make trained parameters the state."""

    @abstractmethod
    def operator(self, fitted: float, damping: float) -> LinearOperator:
        """Q as an operator; `fitted` is the damping that q was fitted at."""


def _redamped(q: Tensor, fitted: float, damping: float) -> Tensor:
    """Q at another damping: 1/q − γ is the curvature that q stands for."""
    return q if damping == fitted else ((q.reciprocal() - fitted).clamp_min(0) + damping).reciprocal()


def _mixed(old: Tensor | None, new: Tensor, decay: float) -> Tensor:
    return new if old is None else decay * old + (1 - decay) * new


def _mean(totals: dict[str, Tensor], name: str, count: int) -> Tensor:
    """A sum over `count` examples, used up, as a mean.

    Raises:
        CurvatureError: it is not finite.
    """
    mean = totals.pop(name).div_(count)
    if not bool(mean.isfinite().all()):
        raise CurvatureError("the squares of the gradients overflow; use a model in float64, or scale its loss")
    return mean


def _add(totals: dict[str, Tensor], name: str, part: Tensor) -> None:
    """Add to a sum in float64; `part` is given away."""
    if name in totals:
        totals[name] += part
    else:
        totals[name] = part.double()


class DiagonalBlock(Block):
    """Q = diag(q): biases, norms, and tensors too large for factors."""

    def identity(self, damping: float, like: Tensor) -> None:
        self.state["q"] = like.new_full((self.size,), 1 / damping)

    def gather_spectrum(self, rows: Tensor, totals: dict[str, Tensor]) -> None:
        _add(totals, "spectrum", rows.square().sum(0))

    def closed_form(self, damping: float) -> None:
        self.state["q"] = (self.state["spectrum"] + damping).reciprocal()

    def trainable(self) -> dict[str, Tensor]:
        return {"log_q": self.state["q"].log().requires_grad_(True)}

    def product(self, parameters: Mapping[str, Tensor], U: Tensor) -> Tensor:
        return parameters["log_q"].exp()[:, None] * U

    def absorb(self, parameters: Mapping[str, Tensor]) -> None:
        self.state["q"] = parameters["log_q"].detach().exp()

    def operator(self, fitted: float, damping: float) -> LinearOperator:
        return Diagonal(_redamped(self.state["q"], fitted, damping))


class KroneckerBlock(Block):
    """Q = (L ⊗ R) diag(q) (L ⊗ R)ᵀ; starts in the Kronecker-factored eigenbasis, or at I/γ.

    The bases U_L, U_R are the eigenvectors of E G Gᵀ and E Gᵀ G, taken from the gradient rows themselves, and
    D = E (U_Lᵀ G U_R)² their own second moments (as in EKFAC; George et al., 2018). Training moves the factors
    multiplicatively, L ← L M with M = I at the start, so that one step size suits factors of any scale.

    The state: `outputs` (rows, rows) and `inputs` (columns, columns), the moments, in float64; `left_basis`,
    `right_basis` and `spectrum` (rows, columns), U_L, U_R and D; `q` (rows, columns); and `left`, `right`, L and R,
    where they are no longer U_L and U_R.

    Args:
        rows, columns: of the tensor as a matrix.
        inner: whether q is free; without it Q is the plain product LLᵀ ⊗ RRᵀ.
    """

    def __init__(self, rows: int, columns: int, *, inner: bool = True) -> None:
        super().__init__(rows * columns)
        self.rows, self.columns, self.inner = rows, columns, inner

    def _factor(self, side: str) -> Tensor:
        return self.state.get(side, self.state[f"{side}_basis"])

    def identity(self, damping: float, like: Tensor) -> None:
        self.state["left_basis"] = torch.eye(self.rows, dtype=like.dtype, device=like.device)
        self.state["right_basis"] = torch.eye(self.columns, dtype=like.dtype, device=like.device)
        self.state["q"] = like.new_full((self.rows, self.columns), 1 / damping)

    def gather_bases(self, rows: Tensor, totals: dict[str, Tensor]) -> None:
        G = rows.view(-1, self.rows, self.columns)
        flat = G.reshape(-1, self.columns)
        _add(totals, "inputs", flat.mT @ flat)
        del flat  # a copy of the rows each; one at a time
        wide = G.movedim(1, 0).reshape(self.rows, -1)
        _add(totals, "outputs", wide @ wide.mT)

    def set_bases(self, totals: dict[str, Tensor], count: int, decay: float, dtype: torch.dtype) -> None:
        turns = []
        for basis, name in (("left_basis", "outputs"), ("right_basis", "inputs")):
            self.state[name] = _mixed(self.state.get(name), _mean(totals, name, count), decay)
            # contiguous: products must not depend on whether a state was saved and loaded in between
            new, old = torch.linalg.eigh(self.state[name]).eigenvectors.to(dtype).contiguous(), self.state.get(basis)
            turns.append(None if old is None else (new.mT @ old).square_())
            self.state[basis] = new
        left, right = turns
        if "spectrum" in self.state and left is not None and right is not None:
            # The earlier model of F, seen in the new basis: its diagonal there.
            self.state["spectrum"] = left @ self.state["spectrum"] @ right.mT

    def gather_spectrum(self, rows: Tensor, totals: dict[str, Tensor]) -> None:
        G = rows.view(-1, self.rows, self.columns)
        rotated = self.state["left_basis"].mT @ (G @ self.state["right_basis"])
        _add(totals, "spectrum", rotated.square_().sum(0))

    def closed_form(self, damping: float) -> None:
        """Q = 1/(D + γ); without a free q, its best rank-one fit in the logarithm goes into the factors."""
        q = (self.state["spectrum"] + damping).reciprocal()
        self.state.pop("left", None)
        self.state.pop("right", None)
        if not self.inner:
            log_q = q.log()
            level = log_q.mean()
            self.state["left"] = self.state["left_basis"] * (0.5 * (log_q.mean(1) - level / 2)).exp()
            self.state["right"] = self.state["right_basis"] * (0.5 * (log_q.mean(0) - level / 2)).exp()
            q = torch.ones_like(q)
        self.state["q"] = q

    def trainable(self) -> dict[str, Tensor]:
        q = self.state["q"]
        parameters = {
            "left": torch.eye(self.rows, dtype=q.dtype, device=q.device),
            "right": torch.eye(self.columns, dtype=q.dtype, device=q.device),
        }
        if self.inner:
            parameters["log_q"] = q.log()
        return {name: tensor.requires_grad_(True) for name, tensor in parameters.items()}

    def product(self, parameters: Mapping[str, Tensor], U: Tensor) -> Tensor:
        q = parameters["log_q"].exp() if self.inner else self.state["q"]
        L, R = self._factor("left") @ parameters["left"], self._factor("right") @ parameters["right"]
        X = U.mT.reshape(-1, self.rows, self.columns)
        return (L @ (q * (L.mT @ X @ R)) @ R.mT).reshape(U.shape[1], -1).mT

    def absorb(self, parameters: Mapping[str, Tensor]) -> None:
        for side in ("left", "right"):
            self.state[side] = self._factor(side) @ parameters[side].detach()
        if self.inner:
            self.state["q"] = parameters["log_q"].detach().exp()

    def operator(self, fitted: float, damping: float) -> LinearOperator:
        if not self.inner and damping != fitted:
            raise CurvatureError(
                f"structure 'kronecker' was fitted at damping {fitted:.1e} and knows no other; "
                "use structure 'eigenbasis', or run again with the damping you want"
            )
        q = _redamped(self.state["q"], fitted, damping)
        return KroneckerDiagonal(self._factor("left"), self._factor("right"), q, orthogonal="left" not in self.state)
