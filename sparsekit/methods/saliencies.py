"""The built-in saliencies; the weights with the lowest scores are removed first."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sparsekit.linalg import eliminate
from sparsekit.methods.interfaces import Saliency, ScoreContext, Settings
from sparsekit.methods.loss_models import PenaltySettings, penalised
from sparsekit.problem.parameters import ParameterSpace

#: Float64 blocks in memory at a time for each row whose weights `obs-rows` eliminates.
COPIES = 4


class Magnitude(Saliency):
    """w²: small weights are removed first."""

    name: ClassVar[str] = "magnitude"

    def score(self, context: ScoreContext) -> Tensor:
        """w_i²."""
        return context.weights.square()


class Random(Saliency):
    """Uniform scores, the baseline that every method must beat."""

    name: ClassVar[str] = "random"

    def score(self, context: ScoreContext) -> Tensor:
        """Uniform in [0, 1)."""
        generator = context.generator
        uniform = torch.rand(context.weights.shape, generator=generator, device=generator.device)
        return uniform.to(context.weights.device)


class OptimalBrainSurgeon(Saliency):
    """w_i² / (2 Σ_ii) + ½ λ w_i²: the loss increase of removing weight i alone and moving the others optimally.

    Σ is conditioned on the weights removed before where its structure can be. Reference: Hassibi and Stork, 1993.
    """

    name: ClassVar[str] = "obs"
    Settings: ClassVar[type[Settings]] = PenaltySettings

    def score(self, context: ScoreContext) -> Tensor:
        """w_i² / (2 Σ_ii), in units of the loss; zero on removed weights."""
        diagonal = context.inverse.diagonal(context.mask).to(context.weights.dtype)
        return penalised(context.weights.square() / (2 * diagonal), context, self.settings)


class RowSettings(Settings):
    """Settings of `obs-rows`."""

    longest: int = Field(
        4096, ge=1, description="weights of a row that are taken together; the rest of a longer row is held as well"
    )
    slice_mebibytes: int = Field(512, ge=1, description="memory for the rows that are worked on at a time")


class RowSurgeon(Saliency):
    """The cost of each weight in greedy Optimal Brain Surgeon within its row, the rest of the network fixed.

    A row is the weights of one output of a layer: those that share a tensor's first index. On the row's block H_oo of
    the precision, remove the weight of least w_i²/(2[(H_SS)⁻¹]_ii), S the weights of the row that are left; move the
    others; repeat to the last (see `linalg.eliminate`). Rows then compete by marginal costs over the whole network.

    `obs` and `obs-greedy` score a removal while all other weights may move. Where inputs are correlated, nearly every
    single weight then costs nothing, but many at once do. What moves after a cut is the rest of a row: compensation
    within layers and reconstruction fit each output's survivors.

    Reference: Frantar and Alistarh, 2022 (ExactOBS), whose H is that of a layer's least squares.
    """

    name: ClassVar[str] = "obs-rows"
    Settings: ClassVar[type[Settings]] = RowSettings

    def score(self, context: ScoreContext) -> Tensor:
        """(n,) marginal costs in units of the loss, float64 to keep the order of near-equals; zero where removed."""
        operator, weights = context.inverse.operator, context.weights.double()
        scores = torch.zeros_like(weights)
        for index in self._slices(context.space, operator.stretches(), context.mask.kept):
            inside = index >= 0
            sigma = operator.conditioned_blocks(index)
            costs = eliminate(sigma, (weights[index.clamp_min(0)] * inside).to(sigma), inside)
            scores[index[inside]] = costs[inside].double()
        return scores

    def _slices(self, space: ParameterSpace, stretches: Sequence[int], kept: Tensor) -> Iterator[Tensor]:
        """Kept coordinates of pieces of rows that H couples, as (m, B) that fit the memory; −1 pads short pieces."""
        device = kept.device
        begins = torch.zeros(space.size, dtype=torch.bool, device=device)  # whether a piece begins here
        begins[torch.tensor([0, *stretches[:-1]], device=device).cumsum(0)] = True
        for info in space.parameters:
            begins[info.slice].view(info.shape[0], -1)[:, :: self.settings.longest] = True
        for info in space.parameters:
            starts, coordinates = (x[info.slice].nonzero()[:, 0] + info.start for x in (begins, kept))
            first = torch.searchsorted(coordinates, starts)  # position of each piece among the kept coordinates
            counts = torch.diff(first, append=first.new_tensor([len(coordinates)]))
            order = counts.argsort(stable=True)  # pieces of similar length next to one another
            lengths = counts[order].tolist()
            done = bisect_right(lengths, 0)
            while done < len(lengths):
                end = bisect_left(range(done + 2, len(lengths) + 1), True, key=self._too_many(lengths, done)) + done + 1
                some = order[done:end, None]
                place = torch.arange(lengths[end - 1], device=device).expand(len(some), -1)
                inside = place < counts[some]
                yield torch.where(inside, coordinates[torch.where(inside, first[some] + place, 0)], -1)
                done = end

    def _too_many(self, lengths: Sequence[int], start: int) -> Callable[[int], bool]:
        """Whether the pieces from `start` to a given end, padded to the last's length, exceed the memory of a slice."""
        most = (self.settings.slice_mebibytes << 20) // (8 * COPIES)
        return lambda end: (end - start) * lengths[end - 1] ** 2 > most
