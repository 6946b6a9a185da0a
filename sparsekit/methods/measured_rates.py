"""Rates of layers from measured errors: how many weights each tensor loses is decided by trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sparsekit.methods.interfaces import Settings, Trial
from sparsekit.methods.patterns import FloorSettings, Unstructured
from sparsekit.problem.parameters import Mask, ParameterSpace


class MeasuredRatesSettings(FloorSettings):
    """Settings of `measured-rates`."""

    examples: int = Field(256, ge=1, description="calibration examples of each trial, at most as many as there are")
    density_factor: float = Field(
        0.75, gt=0, lt=1, description="each trial keeps so many of the weights that the one before has kept"
    )
    least_density: float = Field(0.01, gt=0, lt=1, description="of a tensor, at which its trials end")


class MeasuredRates(Unstructured):
    """Any weights of the whole space; scores rank within a tensor, trials say how many of each go.

    From each tensor alone the lowest scores are removed, at a grid of densities, the rest of the tensor compensates as
    the run's compensation says, and the divergence of the predictions from those before is measured. The numbers n_l
    are then those that minimise Σ_l e_l(n_l) at the given Σ_l n_l, with e_l the largest convex function below what was
    measured: the Lagrangian relaxation of the dynamic program over layers, equal to it wherever its solution lies on
    these hulls. Every count is exact.

    One set of trials serves all levels that begin at the same weights. Floors, see `unstructured`, hold as well.

    Reference: Frantar and Alistarh, 2022 (ExactOBS, section 5, and SPDY), who solve it by a dynamic program on a grid.
    """

    name: ClassVar[str] = "measured-rates"
    Settings: ClassVar[type[Settings]] = MeasuredRatesSettings

    def rescore(self, scores: Tensor, mask: Mask, space: ParameterSpace, trial: Trial) -> Tensor:
        """(n,) ranks by marginal measured cost; within a tensor in the order of the scores, ties by index."""
        slopes = torch.zeros_like(scores, dtype=torch.float64)
        places = torch.zeros_like(slopes)  # of weights of one slope: how far down its stretch a weight is
        for info in space.parameters:
            kept = mask.kept[info.slice].nonzero()[:, 0] + info.start
            order = kept[scores[kept].argsort(stable=True)]
            counts = self._counts(len(order), info.size)
            increases = []
            for count in counts:
                chosen = torch.zeros_like(mask.kept)
                chosen[order[:count]] = True
                increases.append(trial(chosen, self.settings.examples))
            done = 0
            for end, slope in hull(counts, increases):
                slopes[order[done:end]] = slope
                places[order[done:end]] = torch.arange(end - done, device=order.device).double() / (end - done)
                done = end
            slopes[order[done:]] = torch.inf
            places[order[done:]] = torch.arange(len(order) - done, device=order.device).double()
        first = places.argsort(stable=True)
        ranks = torch.empty_like(slopes)
        ranks[first[slopes[first].argsort(stable=True)]] = torch.arange(len(ranks), device=ranks.device).double()
        return ranks

    def _counts(self, kept: int, size: int) -> list[int]:
        """Numbers of weights to remove of a tensor, increasing; the first density is that of the tensor now."""
        counts: list[int] = []
        left = kept * self.settings.density_factor
        while left >= max(1.0, self.settings.least_density * size):
            if kept - int(left) > (counts[-1] if counts else 0):
                counts.append(kept - int(left))
            left *= self.settings.density_factor
        return counts


def hull(counts: Sequence[int], increases: Sequence[float]) -> list[tuple[int, float]]:
    """The largest convex, non-decreasing function below (0, 0) and the given points: (end, slope) of its pieces.

    Args:
        counts: increasing, positive.
        increases: measured there; noise may make them negative, which counts as zero.
    """
    corners: list[tuple[int, float]] = [(0, 0.0)]
    for count, increase in zip(counts, increases, strict=True):
        corner = count, max(increase, 0.0)
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-2], corner):
            corners.pop()
        corners.append(corner)
    return [(end[0], _slope(start, end)) for start, end in zip(corners, corners[1:], strict=False)]


def _slope(start: tuple[int, float], end: tuple[int, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])
