"""Saliencies that are models of the loss: what removing one weight, and nothing else, is expected to cost.

Names and formulas are those of Laurent et al., 2020 ("Revisiting loss modelling for unstructured pruning"), with
θ = w, g = ∇L(w) and h the diagonal of the Gauss-Newton matrix, all at the present weights on the calibration examples.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sparsekit.curvature.vectors import FisherKind
from sparsekit.methods.interfaces import Saliency, ScoreContext, Settings


class PenaltySettings(Settings):
    """Settings of saliencies with a norm penalty."""

    penalty: float = Field(
        0.0, ge=0, description="λ: ½ λ w² is added to each score, outside of any absolute value; 0: none"
    )


class CurvedSettings(PenaltySettings):
    """Settings of saliencies that use the Gauss-Newton diagonal."""

    curvature: FisherKind = Field(
        "exact",
        description="of the diagonal h. exact: every column of the output's Fisher; sampled: labels drawn from the "
        "model, one an example; importance: one column an example, drawn in proportion to its length; empirical: the "
        "data's labels",
    )


def penalised(scores: Tensor, context: ScoreContext, settings: PenaltySettings | None) -> Tensor:
    """Scores + ½ λ w², zero on removed weights, (n,)."""
    if settings is not None and settings.penalty:
        scores = scores + 0.5 * settings.penalty * context.weights.square()
    return torch.where(context.mask.kept, scores, 0.0)


class LinearModel(Saliency[PenaltySettings]):
    """LM: |g w| + ½ λ w², the size of the first-order change of the loss.

    Reference: Laurent et al., 2020; Mozer and Smolensky, 1989, without the absolute value.
    """

    name: ClassVar[str] = "linear-model"
    Settings: ClassVar[type[Settings]] = PenaltySettings
    takes_gradient: ClassVar[bool] = True

    def score(self, context: ScoreContext) -> Tensor:
        """(n,), in units of the loss."""
        return penalised((context.gradient * context.weights).abs(), context, self.settings)

    def predicted(self, context: ScoreContext, delta: Tensor) -> float:
        """gᵀδ."""
        return float(torch.dot(context.gradient.double(), delta.double()))


class QuadraticModel(Saliency[CurvedSettings]):
    """QM: |−g w + ½ h w²| + ½ λ w², the size of the change of the loss to second order.

    Reference: Laurent et al., 2020.
    """

    name: ClassVar[str] = "quadratic-model"
    Settings: ClassVar[type[Settings]] = CurvedSettings
    takes_gradient: ClassVar[bool] = True

    def score(self, context: ScoreContext) -> Tensor:
        """(n,), in units of the loss."""
        w, h = context.weights, context.diagonal(self.settings.curvature)
        return penalised((0.5 * h * w.square() - context.gradient * w).abs(), context, self.settings)

    def predicted(self, context: ScoreContext, delta: Tensor) -> float:
        """gᵀδ + ½ Σ_k h_k δ_k²."""
        h = context.diagonal(self.settings.curvature)
        return float(torch.dot(context.gradient.double(), delta.double())) + _curved(h, delta)


class OptimalBrainDamage(Saliency[CurvedSettings]):
    """OBD: ½ h w² + ½ λ w², the change of the loss of a network at its minimum.

    The saliency `obs` with the estimator `diagonal` is this one: w²/(2Σ_ii) = ½ (h + γ) w², so its damping γ is λ.

    Reference: LeCun, Denker and Solla, 1990.
    """

    name: ClassVar[str] = "obd"
    Settings: ClassVar[type[Settings]] = CurvedSettings
    takes_gradient: ClassVar[bool] = True

    def score(self, context: ScoreContext) -> Tensor:
        """(n,), in units of the loss."""
        h = context.diagonal(self.settings.curvature)
        return penalised(0.5 * h * context.weights.square(), context, self.settings)

    def predicted(self, context: ScoreContext, delta: Tensor) -> float:
        """½ Σ_k h_k δ_k²."""
        return _curved(context.diagonal(self.settings.curvature), delta)


def _curved(h: Tensor, delta: Tensor) -> float:
    return 0.5 * float(torch.dot(h.double(), delta.double().square()))
