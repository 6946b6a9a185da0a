"""The built-in saliencies: the weights with the lowest scores go first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sparsekit.interfaces import Saliency, ScoreContext, Settings
from sparsekit.linalg import eliminate
from sparsekit.parameters import ParameterSpace

#: Blocks of float64 that are alive at a time for each row whose weights `obs-rows` eliminates.
COPIES = 3


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


class RowSettings(Settings):
    """Settings of `obs-rows`."""

    longest: int = Field(
        4096, ge=1, description="weights of a row that are taken together; the rest of a longer row is held as well"
    )
    slice_mebibytes: int = Field(256, ge=1, description="memory for the rows that are worked on at a time")


class RowSurgeon(Saliency):
    """What each weight costs when greedy Optimal Brain Surgeon takes it, within its row, the rest of the network held.

    A row is what one output of a layer reads: the weights that share a tensor's first index. On its own block H_oo of
    the precision: remove the weight of least w_i²/(2[(H_SS)⁻¹]_ii), S those of the row that are left; move the others;
    and so on to the last (see `linalg.eliminate`). Rows then compete by marginal costs over the whole network.

    `obs` and `obs-greedy` ask what a removal costs while all else may move. Where inputs are correlated nearly every
    weight is free by that measure, and many at once are not. What really moves after a cut is the rest of a row:
    compensation within layers and reconstruction fit each output's survivors.

    Reference: Frantar and Alistarh, 2022 (ExactOBS), whose H is that of a layer's least squares.
    """

    name: ClassVar[str] = "obs-rows"
    Settings: ClassVar[type[Settings]] = RowSettings

    def score(self, context: ScoreContext) -> Tensor:
        """(n,) marginal costs in units of the loss, float64 so that the order of equals is kept; zero where gone."""
        operator, weights = context.inverse.operator, context.weights.double()
        scores = torch.zeros_like(weights)
        for index in self._slices(context.space, context.mask.kept):
            inside = index >= 0
            costs = eliminate(operator.conditioned_blocks(index), weights[index.clamp_min(0)] * inside, inside)
            scores[index[inside]] = costs[inside]
        return scores

    def _slices(self, space: ParameterSpace, kept: Tensor) -> Iterator[Tensor]:
        """The kept coordinates of pieces of rows, padded by −1 behind them: (m, B), few enough for the memory."""
        for info in space.parameters:
            rows = torch.arange(info.start, info.start + info.size, device=kept.device).view(info.shape[0], -1)
            for piece in rows.split(self.settings.longest, dim=1):
                counts, order = kept[piece].sum(1).sort(stable=True)  # rows of like length beside one another
                first, lengths = int((counts == 0).sum()), counts.tolist()
                while first < len(lengths):
                    last = first
                    while last < len(lengths) and self._fits(last + 1 - first, lengths[last]):
                        last += 1
                    last = max(last, first + 1)
                    some = piece[order[first:last]]
                    front = (~kept[some]).sort(dim=1, stable=True).indices[:, : lengths[last - 1]]
                    index = some.gather(1, front)
                    yield torch.where(kept[index], index, -1)
                    first = last

    def _fits(self, rows: int, length: int) -> bool:
        return rows * length * length * COPIES * 8 <= self.settings.slice_mebibytes << 20
