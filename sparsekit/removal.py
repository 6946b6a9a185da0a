"""Removal: the change of the weights in a cut, and its cost by the quadratic model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sparsekit.errors import CurvatureError, SettingsError
from sparsekit.linalg import DirectSum, KroneckerDiagonal, LinearOperator
from sparsekit.problem.parameters import Mask, ParameterSpace

Compensation = Literal["joint", "independent", "none"]


@dataclass(frozen=True)
class Removal:
    """The change of the weights in a cut.

    Attributes:
        delta: (n,), to be added to the weights; exactly −w on every weight removed now or before.
        increase: ½ δᵀHδ + gᵀδ, the quadratic model's loss increase for this δ, in units of the mean loss.
        iterations: conjugate-gradient iterations of the solve; 0 where it was direct.
        residual: its relative residual; 0 where it was direct.
        fell_back: whether the joint solution costs more than no compensation, beyond rounding; then δ moves no
            survivor.
    """

    delta: Tensor
    increase: float
    iterations: int = 0
    residual: float = 0.0
    fell_back: bool = False


class InverseFisher:
    """Σ ≈ (F + γI)⁻¹ on Rⁿ, the result of an estimator: an operator, and the damping γ in it.

    Attributes:
        operator: Σ, with its solve, diagonals and constrained minima.
        damping: γ, in units of the Fisher information.
    """

    def __init__(self, operator: LinearOperator, damping: float) -> None:
        self.operator = operator
        self.damping = damping

    @property
    def size(self) -> int:
        """The number of weights, n."""
        return self.operator.size

    def __matmul__(self, X: Tensor) -> Tensor:
        """Σ X, for X (n,) or (n, k)."""
        return (self.operator @ X.to(self.operator.dtype)).to(X.dtype)

    def precision(self, X: Tensor) -> Tensor:
        """H X = Σ⁻¹ X, for X (n,) or (n, k)."""
        return self.operator.solve(X.to(self.operator.dtype)).to(X.dtype)

    def output_factors(self, space: ParameterSpace) -> dict[str, Tensor]:
        """The Fisher information of layers' outputs, up to a factor: name -> (groups, out/groups, out/groups).

        The marginal of H − γI over a weight's inputs, for those whose part of Σ is of Kronecker structure with the
        outputs as its first mode.
        """
        if not isinstance(self.operator, DirectSum) or len(self.operator.parts) != len(space):
            return {}
        found = {}
        for info, part in zip(space.parameters, self.operator.parts, strict=True):
            if isinstance(part, KroneckerDiagonal) and part.outer is None and part.size == info.size:
                groups, first = part.q.shape[:2]
                if groups * first == info.shape[0]:
                    eye = torch.eye(first, dtype=part.dtype, device=part.device)
                    found[info.name] = part.marginal(0) - self.damping * info.size / info.shape[0] * eye
        return found

    def conditioned(self, mask: Mask | None) -> LinearOperator:
        """Σ given that the removed weights stay removed, as far as the structure can."""
        if mask is None or not mask.removed_count:
            return self.operator
        return self.operator.conditioned(mask.kept)

    def diagonal(self, mask: Mask | None = None, conditioned: LinearOperator | None = None) -> Tensor:
        """Diag Σ, (n,); with a mask, conditioned on the removed weights as far as the structure can.

        Zero on removed weights, positive elsewhere.

        Args:
            mask: see above.
            conditioned: Σ conditioned on this mask, if the caller has it; it is costly to compute.

        Raises:
            CurvatureError: an entry that should be positive is not. Nothing may be ranked by it: negative
                entries would be removed first.
        """
        diagonal = (self.conditioned(mask) if conditioned is None else conditioned).diagonal()
        inside = diagonal if mask is None else diagonal[mask.kept]
        if inside.numel() and not bool((inside > 0).all() & inside.isfinite().all()):
            raise CurvatureError(
                f"the inverse Fisher's diagonal has {int((~(inside > 0)).sum())} entries of {inside.numel()} "
                f"that are not positive at damping {self.damping:.1e}; raise the damping"
            )
        return diagonal if mask is None else torch.where(mask.kept, diagonal, 0.0)

    def remove(
        self,
        weights: Tensor,
        mask: Mask,
        chosen: Tensor,
        how: Compensation = "joint",
        gradient: Tensor | None = None,
        scale: float = 1.0,
    ) -> Removal:
        """Remove the chosen weights and move the others according to `how`.

        With Q = chosen, R = removed before, C = Q ∪ R, S the survivors, t = −w on Q and 0 on R:

        - joint: δ minimises gᵀδ + ½ δᵀHδ subject to δ_C = t, that is δ = Σ_{:C} (Σ_CC)⁻¹ t for g = 0.
        - independent: δ = −Σg − Σ_{i∈Q} Σ_{:i} (w_i − (Σg)_i) / Σ_ii, then δ_C = t: the sum of single-weight
          solutions, as WoodFisher and oBERT (g = 0) and WoodTaylor publish it. Σ is conditioned on R where its
          structure can be.
        - none: δ_C = t only.

        Args:
            weights: w, (n,), zero on R.
            mask: before the cut.
            chosen: (n,) bool, kept weights to be removed now.
            how: see above.
            gradient: g, (n,); the model's first-order term, taken as zero by default.
            scale: of the survivors' move, in [0, 1]; 1 is the solution, 0 is `none`.

        Raises:
            CurvatureError: the joint solve does not converge, the result is not finite, or δᵀHδ is negative.

        Reference: Hassibi and Stork, 1993; Singh and Alistarh, 2020 (independent).
        """
        if how not in get_args(Compensation):
            raise SettingsError(f"compensation '{how}' is not one of {', '.join(get_args(Compensation))}")
        if bool((chosen & mask.removed).any()):
            raise ValueError("weights that were removed before cannot be chosen again")
        dtype = self.operator.dtype
        target = torch.where(chosen, -weights, 0.0).to(dtype)
        linear = None if gradient is None else gradient.to(dtype)
        fixed = chosen | mask.removed
        iterations, residual = 0, 0.0
        if how == "none":
            delta = target
        elif how == "independent":
            delta = self._independent(target, fixed, mask, linear)
        else:
            minimum = self.operator.minimise(fixed, target, linear)
            delta, iterations, residual = minimum.solution, minimum.iterations, minimum.residual
        if scale != 1.0:
            delta = torch.where(fixed, target, scale * delta)
        increase, fell_back = self.increase(delta, linear), False
        if how == "joint" and (without := self.increase(target, linear)) < increase:
            # An unfinished solve on the fixed side is not feasible by itself; what is applied still has to be
            # the better of the two.
            fell_back = increase - without > self._rounding(target)
            delta, increase = target, without
        if not bool(delta.isfinite().all()) or math.isnan(increase):
            raise CurvatureError(f"the update at damping {self.damping:.1e} is not finite; raise the damping")
        delta = torch.where(fixed, target, delta).to(weights.dtype)
        return Removal(torch.where(chosen, -weights, delta), increase, iterations, residual, fell_back)

    def increase(self, delta: Tensor, gradient: Tensor | None = None) -> float:
        """gᵀδ + ½ δᵀHδ for δ (n,), in units of the mean loss.

        Raises:
            CurvatureError: δᵀHδ is negative by more than rounding: Σ is not positive definite.
        """
        delta = delta.to(self.operator.dtype)
        value = 0.5 * torch.dot(delta.double(), self.operator.solve(delta).double())
        if float(value) < 0 and float(value) < -self._rounding(delta):
            raise CurvatureError(
                f"the predicted increase ½ δᵀHδ is {float(value):.1e}, which is negative: the inverse Fisher at "
                f"damping {self.damping:.1e} is not positive definite; raise the damping"
            )
        if gradient is not None:
            value = value + torch.dot(gradient.double(), delta.double())
        return float(value)

    def _rounding(self, delta: Tensor) -> float:
        """How far below zero rounding may carry ½ δᵀHδ, by the size of the diagonal's part of it."""
        diagonal = torch.dot(delta.double().square(), self.operator.inverse_diagonal().double().abs())
        return float(torch.finfo(self.operator.dtype).eps ** 0.5 * diagonal)

    def _independent(self, target: Tensor, fixed: Tensor, mask: Mask, linear: Tensor | None) -> Tensor:
        operator = self.conditioned(mask)
        step = torch.zeros_like(target) if linear is None else -(operator @ (linear * mask.kept))
        chosen = fixed & mask.kept
        multipliers = torch.where(chosen, (target - step) / self.diagonal(mask, operator), 0.0)
        return torch.where(fixed, target, step + operator @ multipliers)
