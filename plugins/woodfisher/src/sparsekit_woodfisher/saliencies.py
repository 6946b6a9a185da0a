"""WoodTaylor: Optimal Brain Surgeon where the gradient has not vanished."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sparsekit import Saliency, ScoreContext, Settings


class WoodTaylorSettings(Settings):
    """Settings of `woodtaylor`."""

    first_order: float = Field(1.0, ge=0, le=1, description="weight of the gradient; 0: the saliency 'obs'")
    penalty: float = Field(0.0, ge=0, description="λ: ½ λ w² is added to each score; 0: none")


class WoodTaylor(Saliency):
    """(w_i − (Σg)_i)²/(2 Σ_ii) + ½ λ w_i²: what removing weight i costs over the best step that removes nothing.

    Minimising gᵀδ + ½δᵀHδ subject to δ_i = −w_i costs this much more than minimising it freely. The update that goes
    with it is `compensation.first_order=1`. Σ is conditioned on the weights removed before, the gradient taken on the
    survivors. A Newton step on few examples overfits them: choose `first_order` on the tuning half.

    Reference: Singh and Alistarh, 2020 (WoodTaylor).
    """

    name: ClassVar[str] = "woodtaylor"
    takes_gradient: ClassVar[bool] = True
    Settings: ClassVar[type[Settings]] = WoodTaylorSettings

    def score(self, context: ScoreContext) -> Tensor:
        """(n,), in units of the loss; zero on removed weights."""
        kept, weights = context.mask.kept, context.weights
        operator = context.inverse.conditioned(context.mask)
        gradient = torch.where(kept, context.gradient, 0.0).to(operator.dtype)
        newton = (operator @ gradient).to(weights.dtype)
        diagonal = torch.where(kept, context.inverse.diagonal(context.mask, operator).to(weights.dtype), 1.0)
        scores = (weights - self.settings.first_order * newton).square() / (2 * diagonal)
        scores = scores + 0.5 * self.settings.penalty * weights.square()
        return torch.where(kept, scores, 0.0)
