"""The built-in saliencies: the weights with the lowest scores go first."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sparsekit.interfaces import Saliency, ScoreContext


class Magnitude(Saliency):
    """θ²: what is small goes."""

    name: ClassVar[str] = "magnitude"

    def score(self, context: ScoreContext) -> Tensor:
        """w_i²."""
        return context.weights.square()


class Random(Saliency):
    """Uniform scores: the floor that any method must beat."""

    name: ClassVar[str] = "random"

    def score(self, context: ScoreContext) -> Tensor:
        """Uniform in [0, 1)."""
        generator = context.generator
        uniform = torch.rand(context.weights.shape, generator=generator, device=generator.device)
        return uniform.to(context.weights.device)


class OptimalBrainSurgeon(Saliency):
    """w_i² / (2 Σ_ii): the loss increase of removing weight i alone and moving the others optimally.

    Σ is conditioned on the weights removed before where its structure can be. Reference: Hassibi and Stork, 1993.
    """

    name: ClassVar[str] = "obs"

    def score(self, context: ScoreContext) -> Tensor:
        """w_i² / (2 Σ_ii), in units of the loss; zero on removed weights."""
        diagonal = context.inverse.diagonal(context.mask).to(context.weights.dtype)
        scores = context.weights.square() / (2 * diagonal)
        return torch.where(context.mask.kept, scores, 0.0)
