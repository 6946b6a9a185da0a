"""The interface of likelihoods: the loss, its labels' distribution, and its curvature in the outputs.

A Fisher matrix needs more than a loss: labels drawn from the model's own distribution, or the square root
of the loss's Hessian in the outputs. A likelihood supplies these beside the loss.

Every likelihood here is a sum or a mean over the T positions (or output units) of an example; L is the mean
of that over examples. Dividing by T scales the loss by 1/T but the covariance of its gradient by 1/T². Gradient rows
are therefore taken from a *score* scaled by 1/√T, so that their second moment is the Gauss-Newton matrix of the
reported loss.

Positions may have weights (class weights; zero where a target is ignored). A weight multiplies a position's loss, and
so its curvature; the Fisher counts a position of weight two as two. Some means divide by the sum of weights within a
batch, as torch's cross-entropy does; `divisor` is that sum. An average of batches in proportion to `divisor` divides by
the sum over all examples, whatever the batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from sparsekit.errors import DataError

Reduction = Literal["mean", "sum"]


class Likelihood(ABC):
    """p(y | output) of one example, and the loss −log p up to a constant and the reduction over positions.

    Its mean over a batch of `losses` is the batch's loss.
    """

    name: str
    reduction: Reduction

    @abstractmethod
    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        """−log p at every position, times its weight: (N, …)."""

    @abstractmethod
    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Labels drawn from p(y | output), in the form of `target`."""

    @abstractmethod
    def root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """Columns r_c of Λ^{1/2}, shaped like `output`: Σ_c r_c r_cᵀ = Λ = ∂²(Σ_t −log p)/∂output².

        Positions are independent given the output, so cross terms between them are zero on average only; where there
        are several positions, each column is non-zero at one of them.
        """

    def drawn_root(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """A random v for each example, shaped like `output`, with E[v vᵀ] = Λ: one backward pass for all columns.

        By default the sum of the columns of Λ^{1/2} with random signs; a likelihood that knows its curvature by
        position has draws with less noise.
        """
        total = torch.zeros_like(output)
        for column in self.root_columns(output):
            drawn = signs((len(output),), generator, output)
            total = total + column * drawn.view(-1, *([1] * (output.dim() - 1)))
        return total

    def curvature(self, output: Tensor, tangent: Tensor) -> Tensor:
        """Λ_n tangent_n for each example, shaped like `output`."""
        image = torch.zeros_like(tangent)
        for column in self.root_columns(output):
            inner = (column * tangent).flatten(1).sum(1)
            image = image + column * inner.view(-1, *([1] * (tangent.dim() - 1)))
        return image

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of each example, (N,): −log p summed or averaged over positions."""
        values = self.elementwise(output, target).flatten(1)
        return values.mean(1) if self.reduction == "mean" else values.sum(1)

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """(N,): −log p scaled so that, for sampled labels, E[∇score ∇scoreᵀ] is the Gauss-Newton matrix of L.

        A position of weight W is divided by √W: the square of its gradient must count W times, not W² times.
        """
        values = self.elementwise(output, target).flatten(1)
        weights = self.weights(output, target)
        if weights is not None:
            values = values * torch.where(weights > 0, weights, torch.inf).rsqrt().flatten(1)
        return values.sum(1) * self.score_scale(values.shape[1])

    def sampled_score(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """As `score`, at labels drawn from p(y | output); `target` only determines the weights."""
        drawn, weights = self.sample(output.detach(), generator), self.weights(output, target)
        if weights is None:
            return self.plain.score(output, drawn)
        values = self.plain.elementwise(output, drawn).flatten(1) * weights.sqrt().flatten(1)
        return values.sum(1) * self.score_scale(values.shape[1])

    def score_scale(self, positions: int) -> float:
        """1/√T under the mean over T positions, else 1."""
        return positions**-0.5 if self.reduction == "mean" else 1.0

    def root_scale(self, output: Tensor, target: Tensor) -> float | Tensor:
        """The factor from the columns of Λ^{1/2} to those of the batch's loss: `score_scale`, times √W by position."""
        scale, weights = self.score_scale(self.positions(output)), self.weights(output, target)
        return scale if weights is None else weights.sqrt() * scale

    def expected(self, output: Tensor) -> Tensor | None:
        """E[y | output], as a target: `losses` at it, minus its own minimum, is the divergence of two predictions.

        None where there is no such target.
        """
        return None

    # -- weights of positions; a likelihood without weights need not override these methods ----------------------
    def weights(self, output: Tensor, target: Tensor) -> Tensor | None:
        """W, the weight of each position's curvature in this batch's loss relative to a plain mean; None: 1 everywhere.

        It has as many dimensions as `output`: (N, 1, T…) for classes in the second one and (N, …) for units.
        """
        return None

    @property
    def plain(self) -> Likelihood:
        """The same distribution without weights, from which labels are drawn."""
        return self

    def divisor(self, target: Tensor) -> float:
        """The divisor of the mean over this batch, in proportion to which batches count; by default its examples."""
        return float(len(target))

    def counted(self, target: Tensor) -> float:
        """The divisor of `accuracy`, in the same way."""
        return float(len(target))

    @abstractmethod
    def positions(self, output: Tensor) -> int:
        """T, the number of independent positions (or units) of one example's output."""

    def accuracy(self, output: Tensor, target: Tensor) -> Tensor | None:
        """(N,) the fraction of each example's positions that are predicted right; its mean is the batch's accuracy.

        None where accuracy is not defined.
        """
        return None


def signs(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Random ±1 of a shape, of the type and on the device of `like`."""
    drawn = torch.randint(2, shape, generator=generator, device=generator.device)
    return (2 * drawn - 1).to(like.device, like.dtype)


def same_shape(name: str, output: Tensor, target: Tensor) -> None:
    """Raise a DataError where a target would be broadcast."""
    if output.shape != target.shape:
        raise DataError(
            f"the {name} loss compares outputs and targets of one shape; the model gives {tuple(output.shape)}, the "
            f"data {tuple(target.shape)}: reshape one of them"
        )


def one_position_at_a_time(column: Tensor, positions: int) -> Iterator[Tensor]:
    """A column (N, C, …) cut into columns that are zero at all positions but one."""
    if positions == 1:
        yield column
        return
    flat = column.flatten(2)  # (N, C, T)
    for t in range(positions):
        single = torch.zeros_like(flat)
        single[:, :, t] = flat[:, :, t]
        yield single.view_as(column)


def one_unit_at_a_time(values: Tensor) -> Iterator[Tensor]:
    """Values (N, …) cut into columns that are zero at all units but one."""
    flat = values.reshape(len(values), -1)
    for t in range(flat.shape[1]):
        single = torch.zeros_like(flat)
        single[:, t] = flat[:, t]
        yield single.view_as(values)
