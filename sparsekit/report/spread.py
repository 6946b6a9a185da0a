"""Statistics over seeds: spreads, differences taken seed by seed, and the format of a metric."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from scipy import stats

#: Of the intervals of differences; each by itself, not corrected for the number of comparisons.
CONFIDENCE = 0.95

#: Pairs below which no interval is claimed.
FEWEST = 3

Verdict = Literal["better", "worse", "tie", "unclaimed"]


@dataclass(frozen=True)
class Metric:
    """A metric of a task: accuracy as a fraction, or a loss per example.

    Attributes:
        name: as in the records.
        resolution: the change of an accuracy by one example; 0: not known.
    """

    name: str
    resolution: float = 0.0

    @property
    def is_accuracy(self) -> bool:
        """Whether it is a fraction of examples, where higher is better; all others are losses: lower is better."""
        return self.name == "accuracy"

    @property
    def title(self) -> str:
        """The name with its unit."""
        return "top-1 accuracy in %" if self.is_accuracy else f"{self.name} (mean per example, lower is better)"

    @property
    def unit(self) -> str:
        """The unit of differences, after a space; empty for a loss, whose unit depends on the task."""
        return " points" if self.is_accuracy else ""

    def text(self, value: float) -> str:
        """93.4 for an accuracy of 0.934; three significant digits of a loss."""
        if not math.isfinite(value):
            return "not finite"
        return f"{100 * value:.1f}" if self.is_accuracy else significant(value)

    def change(self, value: float) -> str:
        """The same with its sign: +1.2, −0.4, 0.0."""
        text = self.text(value)
        if not math.isfinite(value) or not text.strip("-0."):
            return text.lstrip("-")
        return f"−{text[1:]}" if text.startswith("-") else f"+{text}"

    def gain(self, value: float) -> float:
        """The value or its negative, so that higher is better."""
        return value if self.is_accuracy else -value

    def verdict(self, difference: Difference) -> Verdict:
        """The verdict on a difference; `unclaimed` for fewer than FEWEST pairs."""
        if difference.interval is None:
            return "unclaimed"
        low, high = difference.interval
        # Seeds that agree to one example give an interval without width, but one example is no gain.
        if low <= 0 <= high or abs(difference.mean) <= 1.001 * self.resolution:
            return "tie"
        return "better" if self.gain(difference.mean) > 0 else "worse"


@dataclass(frozen=True)
class Spread:
    """Mean, lowest and highest value of a quantity over `n` seeds."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Mapping[int, float]) -> Spread | None:
        """The spread of seed -> value; None without values."""
        if not values:
            return None
        figures = [values[seed] for seed in sorted(values)]
        if any(math.isnan(value) for value in figures):
            return cls(math.nan, math.nan, math.nan, len(figures))
        return cls(sum(figures) / len(figures), min(figures), max(figures), len(figures))


@dataclass(frozen=True)
class Difference:
    """One point's values minus another's, over the seeds that both have.

    Attributes:
        mean, low, high: of the n differences.
        n: number of pairs.
        interval: 95 %, mean ± t(n−1) s/√n; None for fewer than three pairs or where one is not finite.
    """

    mean: float
    low: float
    high: float
    n: int
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, figures: Mapping[int, float], others: Mapping[int, float]) -> Difference | None:
        """The difference seed by seed; None where no seed is in both."""
        pairs = {seed: figures[seed] - others[seed] for seed in figures if seed in others}
        spread = Spread.of(pairs)
        if spread is None:
            return None
        return cls(spread.mean, spread.low, spread.high, spread.n, _interval(list(pairs.values())))


def _interval(values: list[float]) -> tuple[float, float] | None:
    n = len(values)
    if n < FEWEST or not all(math.isfinite(value) for value in values):
        return None
    mean = sum(values) / n
    # stats.t.interval is not defined where all values are equal: its scale must not be zero.
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * stats.sem(values))
    return mean - reach, mean + reach


def significant(value: float) -> str:
    """Three significant digits: 0.223, 58.6, 1,234."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞" if value > 0 else "−∞"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def percent(fraction: float) -> str:
    """A sparsity in percent with as many digits as needed: 90 %, 97.5 %."""
    return f"{round(100 * fraction, 4):g} %"
