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
    """Spearman's ρ, Pearson's correlation of the ranks; see `_of`."""

    def rho(a: Floats, b: Floats) -> Floats:
        ranks = [stats.rankdata(values, axis=1) for values in (a, b)]
        u, v = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
        return _ratio((u * v).sum(1), (u * u).sum(1) * (v * v).sum(1))

    return _of(x, y, rho)


def kendall(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Kendall's τ_b, the excess of pairs in the same order; see `_of`."""

    def tau(a: Floats, b: Floats) -> Floats:
        u, v = (np.sign(values[:, :, None] - values[:, None]) for values in (a, b))
        return _ratio((u * v).sum((1, 2)), (u * u).sum((1, 2)) * (v * v).sum((1, 2)))

    return _of(x, y, tau)


def _ratio(covariance: Floats, product: Floats) -> Floats:
    """Covariance over the root of the product of variances; NaN where one is zero."""
    return np.divide(covariance, np.sqrt(product), out=np.full_like(covariance, np.nan), where=product > 0)


def _of(x: Sequence[float], y: Sequence[float], statistic: Callable[[Floats, Floats], Floats]) -> Correlation:
    """The correlation over the pairs of which both are finite, its interval from resampled pairs, the same each time.

    Scipy's functions take one sample at a time, 2,000 of which take seconds; `statistic` takes samples (k, n) at once.

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
    value = float(statistic(a[None], b[None])[0])
    draws = np.random.default_rng(0).integers(len(pairs), size=(RESAMPLES, len(pairs)))
    found = np.concatenate([statistic(a[some], b[some]) for some in np.array_split(draws, 20)])
    found = found[np.isfinite(found)]  # a resample without spread has no correlation
    ends = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(found, [ends, 100 - ends]) if len(found) else (math.nan, math.nan)
    return Correlation(value, float(low), float(high), len(pairs))
