"""The vectors that are propagated back from the outputs; their second moment is the loss's curvature in these."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sparsekit.errors import CurvatureError
from sparsekit.problem.likelihoods import Likelihood

FisherKind = Literal["importance", "sampled", "exact", "empirical"]
"""Which Fisher: one weighted column of Λ^{1/2} an example, sampled labels, all columns, or the data's labels."""


def output_vectors(
    likelihood: Likelihood, output: Tensor, targets: Tensor, fisher: FisherKind, generator: torch.Generator | None
) -> list[Tensor]:
    """Vectors v, shaped like `output`, with E Σ v vᵀ = Λ (or its empirical stand-in)."""
    if fisher in ("importance", "exact"):
        scale = likelihood.root_scale(output, targets)
        if fisher == "exact":
            return [column * scale for column in likelihood.root_columns(output)]
        return [likelihood.drawn_root(output, _needed(generator)) * scale]
    if fisher == "empirical":
        return [_score_gradient(likelihood, output, targets)]
    leaf = output.detach().requires_grad_(True)
    with torch.enable_grad():
        score = likelihood.sampled_score(leaf, targets, _needed(generator)).sum()
    return list(torch.autograd.grad(score, leaf))


def refuse_rounding(likelihood: Likelihood, output: Tensor, targets: Tensor, vector: Tensor) -> None:
    """A CurvatureError where the empirical vectors are no more than the outputs' rounding errors.

    So they are where targets are what the network itself gives, which a slight change of all outputs shows: it
    changes such vectors by more than they are.
    """
    slightly = 8 * torch.finfo(torch.promote_types(output.dtype, torch.float32)).eps
    moved = _score_gradient(likelihood, output * (1 + slightly), targets)
    if float((moved - vector).norm()) > float(vector.norm()):
        raise CurvatureError(
            "the targets are the network's own outputs up to rounding, and so the empirical Fisher is rounding errors "
            "alone: set the estimator's fisher='importance', with the loss as a likelihood where it is none"
        )


def _score_gradient(likelihood: Likelihood, output: Tensor, targets: Tensor) -> Tensor:
    leaf = output.detach().requires_grad_(True)
    with torch.enable_grad():
        score = likelihood.score(leaf, targets).sum()
    return torch.autograd.grad(score, leaf)[0]


def _needed(generator: torch.Generator | None) -> torch.Generator:
    if generator is None:
        raise ValueError("what is drawn at random needs a generator")
    return generator
