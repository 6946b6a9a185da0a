import math

import pytest
from scipy import stats

from sparsekit.errors import DataError
from sparsekit.report.correlation import kendall, spearman
from sparsekit.report.study import (
    Network,
    alike,
    best,
    chosen,
    correlations,
    costs,
    over_settings,
    sentences,
    settings,
    strata,
)
from sparsekit.report.study_figures import figures_of

X = [0.1, 0.4, 0.2, 0.9, 0.7, 0.3]
Y = [1.0, 2.0, 1.5, 2.5, 3.0, 1.2]


def network(criterion="QM", penalty=0.0, substeps=1, seed=0, increase=1.0, error=0.1, tuning=None, group=""):
    increases = {"reporting": increase, "tuning": increase if tuning is None else tuning}
    errors = {"reporting": error, "tuning": error}
    return Network(criterion, penalty, substeps, group, seed, 0.9, increases, errors, 0.5, increase, 2.0 * substeps)


def grid(slope=1.0):
    """Two criteria × two π × two λ × three seeds; the error goes with ΔL by `slope`."""
    out = []
    for i, (criterion, substeps, penalty) in enumerate(
        (c, s, p) for c in ("LM", "QM") for s in (1, 14) for p in (0.0, 0.1)
    ):
        for seed in range(3):
            increase = 2.0 - 0.2 * i + 0.01 * seed
            out.append(network(criterion, penalty, substeps, seed, increase, 0.5 + slope * 0.1 * increase))
    return out


def test_values_are_scipys():
    tied = [1.0, 1.0, 2.0, 2.0, 2.0, 5.0]
    for y in (Y, tied):
        assert spearman(X, y).value == pytest.approx(stats.spearmanr(X, y).statistic)
        assert kendall(X, y).value == pytest.approx(stats.kendalltau(X, y).statistic)


def test_intervals_hold_the_value_and_are_the_same_each_time():
    found = spearman(X, Y)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found == spearman(X, Y)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    import numpy as np

    draw, hits = np.random.default_rng(1), 0
    for _ in range(60):
        a = draw.normal(size=30)
        found = spearman(a, a + draw.normal(size=30))  # ρ_s = 6/π asin(ρ/2) with ρ = 1/√2
        hits += found.low <= 6 / math.pi * math.asin(0.5**0.5 / 2) <= found.high
    assert hits >= 50


@pytest.mark.parametrize("measure", [spearman, kendall])
def test_fewer_than_four_points_are_refused(measure):
    with pytest.raises(DataError, match="over 3 points was asked for; 4 at least are needed"):
        measure([1, 2, 3, math.nan], [1, 2, 3, 4])


def test_without_spread_there_is_no_correlation():
    assert math.isnan(spearman([1, 1, 1, 1], [1, 2, 3, 4]).value)
    assert spearman([1, 1, 1, 1], [1, 2, 3, 4]).text == "not defined: no spread"


def test_lambda_is_chosen_on_the_tuning_half():
    some = [network(penalty=0.0, increase=1.0, tuning=3.0), network(penalty=0.1, increase=2.0, tuning=1.0)]
    assert [n.penalty for n in best(some)] == [0.1]


def test_a_penalty_with_fewer_seeds_is_not_chosen():
    some = [network(penalty=0.0, seed=s) for s in range(2)] + [network(penalty=0.1, tuning=0.0)]
    assert {n.penalty for n in best(some)} == {0.0}


def test_every_criterion_and_pi_has_one_choice():
    assert set(chosen(grid())) == {("LM", 1), ("LM", 14), ("QM", 1), ("QM", 14)}


def test_points_over_settings_are_means_over_the_seeds():
    x, y = over_settings(grid(), "reporting", "tuning")
    assert len(x) == 8
    assert x[0] == pytest.approx(2.01)
    assert y[0] == pytest.approx(0.701)


@pytest.mark.parametrize(("slope", "words"), [(1.0, "rises with the error"), (-1.0, "falls with the error")])
def test_sentences_say_which_way_it_goes(slope, words):
    assert any(words in line for line in sentences(grid(slope)))


def test_no_relation_is_called_none():
    flat = [
        network("QM", p / 10, 1, s, increase=1.0 + p, error=0.1 + 0.01 * ((p * 5) % 7))
        for p in range(7)
        for s in (0, 1)
    ]
    assert any("says nothing that this data could tell from chance" in line for line in sentences(flat))


def test_too_few_networks_are_said():
    assert any("2 networks are too few to say" in line for line in sentences([network(), network("LM")]))


def test_locality_and_orders_are_said_with_intervals():
    text = " ".join(sentences(grid()))
    assert "QM: from π = 1 to 14, each at its λ, changes ΔL by -0.4 (" in text
    assert "At π = 14, QM in place of LM changes ΔL by -0.8 (" in text


def test_tables_have_a_row_for_each_part():
    assert len(settings(grid()).rows) == 4
    assert [cell.text for cell in costs(grid()).rows[1]] == ["LM", "14", "28", "2"]
    rows = correlations(grid()).rows
    assert [row[1].text for row in rows] == ["reporting", "tuning"]
    assert rows[0][2].text.startswith("+1.00")


def test_further_axes_are_also_taken_together():
    both = [
        network(*n.setting[:3], n.seed, n.increases["reporting"], n.errors["reporting"], group=g)
        for n in grid()
        for g in "ab"
    ]
    assert [row[0].text for row in correlations(both).rows] == ["a", "a", "b", "b", "all together", "all together"]


def test_figures_of_all_four_kinds():
    names = [figure.name for figure in figures_of(grid())]
    assert names == ["study-0-pi", "study-0-lambda", "study-0-predicted", "study-0-error"]


def test_one_pi_and_one_lambda_leave_two_figures_out():
    some = [network(criterion, increase=i) for i, criterion in enumerate(("A", "B", "C", "D"))]
    assert [figure.name for figure in figures_of(some)] == ["study-0-predicted", "study-0-error"]


def test_a_relation_that_only_the_criteria_have_is_none_within_each():
    """Two criteria far apart in both; within each, ΔL and error are opposed."""
    apart = {"A": (0.0, 0.0), "B": (10.0, 0.5)}
    found = [
        network(criterion=name, penalty=float(i), increase=base + i, error=error - 0.01 * i)
        for name, (base, error) in apart.items()
        for i in range(4)
    ]
    table = strata(found)
    assert [(row[1].text, row[2].text[:5]) for row in table.rows] == [
        ("criterion A", "-1.00"),
        ("criterion B", "-1.00"),
    ]


def test_kinds_of_too_few_networks_are_left_out():
    assert alike([network(criterion="A", penalty=float(i)) for i in range(3)] + [network(criterion="B")]) == {}
