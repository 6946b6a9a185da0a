import math

import pytest
from scipy import stats

from sparsekit.report.spread import Difference, Metric, Spread, percent, significant

ACCURACY, LOSS = Metric("accuracy"), Metric("loss")
MINE, THEIRS = {0: 0.91, 1: 0.93, 2: 0.98}, {0: 0.90, 1: 0.90, 2: 0.93}


def test_a_spread_is_mean_least_and_greatest():
    spread = Spread.of({2: 0.9, 0: 0.5, 1: 0.7})
    assert (spread.mean, spread.low, spread.high, spread.n) == (pytest.approx(0.7), 0.5, 0.9, 3)


def test_nothing_has_no_spread():
    assert Spread.of({}) is None


def test_a_spread_with_nan_is_nan_throughout():
    spread = Spread.of({0: 0.5, 1: math.nan})
    assert math.isnan(spread.mean) and math.isnan(spread.low) and spread.n == 2


def test_a_difference_is_taken_seed_by_seed():
    found = Difference.of({0: 3.0, 1: 5.0, 7: 100.0}, {1: 4.0, 0: 1.0, 8: -100.0})
    assert (found.mean, found.low, found.high, found.n) == (1.5, 1.0, 2.0, 2)


def test_without_a_common_seed_there_is_no_difference():
    assert Difference.of({0: 1.0}, {1: 1.0}) is None


def test_the_interval_is_that_of_the_paired_t_test():
    expected = stats.ttest_rel(list(MINE.values()), list(THEIRS.values())).confidence_interval(0.95)
    assert Difference.of(MINE, THEIRS).interval == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_pairs_claim_nothing(n):
    few = {seed: MINE[seed] for seed in range(n)}
    found = Difference.of(few, THEIRS)
    assert found.interval is None
    assert ACCURACY.verdict(found) == "unclaimed"


def test_an_interval_that_covers_zero_is_a_tie():
    assert ACCURACY.verdict(Difference.of(MINE, THEIRS)) == "tie"


@pytest.mark.parametrize(("metric", "verdict"), [(ACCURACY, "better"), (LOSS, "worse")])
def test_more_accuracy_is_better_and_more_loss_is_worse(metric, verdict):
    assert metric.verdict(Difference.of({0: 0.91, 1: 0.92, 2: 0.93}, {0: 0.5, 1: 0.5, 2: 0.5})) == verdict


def test_equal_figures_are_a_tie():
    assert ACCURACY.verdict(Difference.of(MINE, MINE)) == "tie"


def test_what_is_not_finite_claims_nothing():
    assert Difference.of({0: math.nan, 1: 1.0, 2: 1.0}, {0: 1.0, 1: 1.0, 2: 1.0}).interval is None


@pytest.mark.parametrize(
    ("metric", "value", "text", "change"),
    [
        (ACCURACY, 0.93449, "93.4", "+93.4"),
        (ACCURACY, -0.0123, "-1.2", "−1.2"),
        (ACCURACY, -0.0001, "-0.0", "0.0"),
        (LOSS, 0.22345, "0.223", "+0.223"),
        (LOSS, 1234.5, "1,234", "+1,234"),
        (LOSS, math.inf, "not finite", "not finite"),
    ],
)
def test_how_figures_are_written(metric, value, text, change):
    assert (metric.text(value), metric.change(value)) == (text, change)


def test_sparsities_have_as_many_digits_as_they_need():
    assert [percent(0.9), percent(0.975), percent(1 - 0.6**3)] == ["90 %", "97.5 %", "78.4 %"]


def test_what_is_not_defined_is_a_dash():
    assert [significant(math.nan), significant(math.inf)] == ["–", "∞"]


def test_one_example_is_nobodys_gain():
    found = Difference.of(dict.fromkeys(range(3), 0.996), dict.fromkeys(range(3), 1.0))
    assert Metric("accuracy").verdict(found) == "worse"
    assert Metric("accuracy", resolution=1 / 250).verdict(found) == "tie"


def test_the_same_difference_in_every_seed_is_claimed_where_it_is_more_than_an_example():
    found = Difference.of(dict.fromkeys(range(3), 0.9), dict.fromkeys(range(3), 0.5))
    assert Metric("accuracy", resolution=1 / 250).verdict(found) == "better"
