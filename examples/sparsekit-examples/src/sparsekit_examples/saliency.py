"""The saliency `lamp`."""

import torch
from torch import Tensor

from sparsekit import Saliency, ScoreContext, Settings


class Lamp(Saliency[Settings]):
    """w_i² / Σ_j w_j² over the kept weights j of the same tensor with w_j² ≥ w_i² (Lee et al., 2021).

    The score of a tensor's largest weight is one, so that no tensor goes whole under one threshold for all.
    """

    name = "lamp"

    def score(self, context: ScoreContext) -> Tensor:
        scores = torch.zeros_like(context.weights)
        for info in context.space.parameters:
            kept = context.mask.kept[info.slice]
            squares, order = context.weights[info.slice][kept].square().sort()
            not_smaller = squares.flip(0).cumsum(0).flip(0)
            found = torch.empty_like(squares)
            found[order] = squares / not_smaller.clamp_min(torch.finfo(squares.dtype).tiny)
            scores[info.slice][kept] = found
        return scores
