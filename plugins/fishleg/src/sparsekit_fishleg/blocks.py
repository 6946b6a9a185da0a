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
        state: name -> tensor, all that is kept between steps.
        damping: γ that q was fitted at.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.state: dict[str, Tensor] = {}

    @abstractmethod
    def identity(self, damping: float, like: Tensor) -> None:
        """Start from Q = I/γ."""

    @abstractmethod
    def gather_bases(self, rows: Tensor, totals: dict[str, Tensor]) -> None:
        """Add rows (b, n_l) to the sums from which the bases come."""

    @abstractmethod
    def set_bases(self, totals: Mapping[str, Tensor], count: int, decay: float, dtype: torch.dtype) -> None:
        """Mix the sums over `count` examples into what is known and diagonalise."""

    @abstractmethod
    def gather_spectrum(self, rows: Tensor, totals: dict[str, Tensor]) -> None:
        """Add rows (b, n_l) to the sum of squares in the present basis."""

    @abstractmethod
    def set_spectrum(self, totals: Mapping[str, Tensor], count: int, decay: float, dtype: torch.dtype) -> None:
        """Mix the sum of squares over `count` examples into the spectrum D."""

    @abstractmethod
    def closed_form(self, damping: float) -> None:
        """Q = 1/(D + γ), the minimiser of the auxiliary loss over q in the present basis."""

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


class DiagonalBlock(Block):
    """Q = diag(q): biases, norms, and tensors too large for factors."""

    def identity(self, damping: float, like: Tensor) -> None:
        self.state["q"] = like.new_full((self.size,), 1 / damping)

    def gather_bases(self, rows: Tensor, totals: dict[str, Tensor]) -> None:
        """There is no basis to find."""

    def set_bases(self, totals: Mapping[str, Tensor], count: int, decay: float, dtype: torch.dtype) -> None:
        """There is no basis to find."""

    def gather_spectrum(self, rows: Tensor, totals: dict[str, Tensor]) -> None:
        squares = rows.square().sum(0).double()
        totals["spectrum"] = totals["spectrum"] + squares if "spectrum" in totals else squares

    def set_spectrum(self, totals: Mapping[str, Tensor], count: int, decay: float, dtype: torch.dtype) -> None:
        new = (totals["spectrum"] / count).to(dtype)
        self.state["spectrum"] = _mixed(self.state.get("spectrum"), new, decay)

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

    The bases are the eigenvectors of E G Gᵀ and E Gᵀ G, taken from the gradient rows themselves, and
    D = E (Lᵀ G R)² their own second moments (as in EKFAC; George et al., 2018). Training moves the factors
    multiplicatively, L ← L M with M = I at the start, so that one step size suits factors of any scale.

    Args:
        rows, columns: of the tensor as a matrix.
        inner: whether q is free; without it Q is the plain product LLᵀ ⊗ RRᵀ.
    """

    def __init__(self, rows: int, columns: int, *, inner: bool = True) -> None:
        super().__init__(rows * columns)
        self.rows, self.columns, self.inner = rows, columns, inner

    @property
    def _orthogonal(self) -> bool:
        return bool(self.state["orthogonal"])

    def identity(self, damping: float, like: Tensor) -> None:
        self.state["left"] = torch.eye(self.rows, dtype=like.dtype, device=like.device)
        self.state["right"] = torch.eye(self.columns, dtype=like.dtype, device=like.device)
        self.state["q"] = like.new_full((self.rows, self.columns), 1 / damping)
        self.state["orthogonal"] = torch.tensor(True)

    def gather_bases(self, rows: Tensor, totals: dict[str, Tensor]) -> None:
        G = rows.view(-1, self.rows, self.columns)
        flat = G.reshape(-1, self.columns)
        wide = G.movedim(1, 0).reshape(self.rows, -1)
        for name, moment in (("inputs", flat.mT @ flat), ("outputs", wide @ wide.mT)):
            totals[name] = totals[name] + moment.double() if name in totals else moment.double()

    def set_bases(self, totals: Mapping[str, Tensor], count: int, decay: float, dtype: torch.dtype) -> None:
        before = {side: self.state.get(side) for side in ("left", "right")}
        for side, name in (("left", "outputs"), ("right", "inputs")):
            self.state[name] = _mixed(self.state.get(name), totals[name] / count, decay)
            # contiguous: products must not depend on whether a state was saved and loaded in between
            self.state[side] = torch.linalg.eigh(self.state[name]).eigenvectors.to(dtype).contiguous()
        if "spectrum" in self.state and decay > 0 and before["left"] is not None and before["right"] is not None:
            # The earlier model of F, seen in the new basis: its diagonal there.
            left = (self.state["left"].mT @ before["left"]).square()
            right = (self.state["right"].mT @ before["right"]).square()
            self.state["spectrum"] = left @ self.state["spectrum"] @ right.mT
        self.state["orthogonal"] = torch.tensor(True)

    def gather_spectrum(self, rows: Tensor, totals: dict[str, Tensor]) -> None:
        G = rows.view(-1, self.rows, self.columns)
        squares = (self.state["left"].mT @ (G @ self.state["right"])).square_().sum(0).double()
        totals["spectrum"] = totals["spectrum"] + squares if "spectrum" in totals else squares

    def set_spectrum(self, totals: Mapping[str, Tensor], count: int, decay: float, dtype: torch.dtype) -> None:
        new = (totals["spectrum"] / count).to(dtype)
        self.state["spectrum"] = _mixed(self.state.get("spectrum"), new, decay)

    def closed_form(self, damping: float) -> None:
        """Q = 1/(D + γ); without a free q, its best rank-one fit in the logarithm goes into the factors."""
        q = (self.state["spectrum"] + damping).reciprocal()
        if not self.inner:
            log_q = q.log()
            level = log_q.mean()
            self.state["left"] = self.state["left"] * (0.5 * (log_q.mean(1) - level / 2)).exp()
            self.state["right"] = self.state["right"] * (0.5 * (log_q.mean(0) - level / 2)).exp()
            self.state["orthogonal"] = torch.tensor(False)
            q = torch.ones_like(q)
        self.state["q"] = q

    def trainable(self) -> dict[str, Tensor]:
        left, right = self.state["left"], self.state["right"]
        parameters = {
            "left": torch.eye(self.rows, dtype=left.dtype, device=left.device),
            "right": torch.eye(self.columns, dtype=right.dtype, device=right.device),
        }
        if self.inner:
            parameters["log_q"] = self.state["q"].log()
        return {name: tensor.requires_grad_(True) for name, tensor in parameters.items()}

    def product(self, parameters: Mapping[str, Tensor], U: Tensor) -> Tensor:
        q = parameters["log_q"].exp() if self.inner else self.state["q"]
        L, R = self.state["left"] @ parameters["left"], self.state["right"] @ parameters["right"]
        X = U.mT.reshape(-1, self.rows, self.columns)
        return (L @ (q * (L.mT @ X @ R)) @ R.mT).reshape(U.shape[1], -1).mT

    def absorb(self, parameters: Mapping[str, Tensor]) -> None:
        self.state["left"] = self.state["left"] @ parameters["left"].detach()
        self.state["right"] = self.state["right"] @ parameters["right"].detach()
        if self.inner:
            self.state["q"] = parameters["log_q"].detach().exp()
        self.state["orthogonal"] = torch.tensor(False)

    def operator(self, fitted: float, damping: float) -> LinearOperator:
        if not self.inner and damping != fitted:
            raise CurvatureError(
                f"structure 'kronecker' was fitted at damping {fitted:.1e} and knows no other; "
                "use structure 'eigenbasis', or run again with the damping you want"
            )
        q = _redamped(self.state["q"], fitted, damping)
        return KroneckerDiagonal(self.state["left"], self.state["right"], q, orthogonal=self._orthogonal)
