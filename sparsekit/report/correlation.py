"""Rank correlations with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sparsekit.compare.study import FEWEST_NETWORKS
from sparsekit.errors import DataError
from sparsekit.report.spread import CONFIDENCE

Floats = NDArray[np.float64]

#: Resamples of an interval.
RESAMPLES = 2000


@dataclass(frozen=True)
class Correlation:
    """A rank correlation over n points.

    Attributes:
        value: in [−1, 1]; NaN where one of the two quantities is the same everywhere.
        low, high: ends of the 95 % bootstrap interval (percentiles); NaN where there is none.
        n: number of points.
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def text(self) -> str:
        """'+0.62 (+0.31 to +0.80)'."""
        if math.isnan(self.value):
            return "not defined: no spread"
        interval = "" if math.isnan(self.low) else f" ({self.low:+.2f} to {self.high:+.2f})"
        return f"{self.value:+.2f}{interval}"


def spearman(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Spearman's ρ; see `_of`."""
    return _of(x, y, lambda a, b: float(stats.spearmanr(a, b).statistic))


def kendall(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Kendall's τ_b; see `_of`."""
    return _of(x, y, lambda a, b: float(stats.kendalltau(a, b).statistic))


def _of(x: Sequence[float], y: Sequence[float], statistic: Callable[[Floats, Floats], float]) -> Correlation:
    """The correlation over the pairs of which both are finite, its interval from resampled pairs, the same each time.

    Raises:
        DataError: fewer than four pairs.
    """
    pairs = np.array([(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)])
    if len(pairs) < FEWEST_NETWORKS:
        raise DataError(
            f"a correlation over {len(pairs)} points was asked for; {FEWEST_NETWORKS} at least are needed: give more "
            "networks"
        )
    a, b = pairs.T
    if (a == a[0]).all() or (b == b[0]).all():
        return Correlation(math.nan, math.nan, math.nan, len(pairs))
    draws = np.random.default_rng(0).integers(len(pairs), size=(RESAMPLES, len(pairs)))
    found = [
        statistic(a[i], b[i]) for i in draws if (a[i] != a[i[0]]).any() and (b[i] != b[i[0]]).any()
    ]  # a resample without spread has no correlation
    ends = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(found, [ends, 100 - ends]) if found else (math.nan, math.nan)
    return Correlation(statistic(a, b), float(low), float(high), len(pairs))
