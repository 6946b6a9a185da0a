"""The first screen: the best row of each method, what won, by how much, at what price."""

import pytest

from sparsekit.compare.plan import Comparison
from sparsekit.report.headline import headline
from sparsekit.report.summary import summarise


@pytest.fixture
def task(comparison):
    task, *_ = summarise(Comparison.load(comparison)).tasks
    return task


def cells(task, method):
    found = headline(task, "magnitude")
    return next(row for row in found.table.rows if row[0].text == method)


def test_a_row_for_each_method_and_the_dense_network(task):
    names = [row[0].text for row in headline(task, "magnitude").table.rows]
    assert names == ["dense", *dict.fromkeys(point.method for point in task.points)]


def test_a_cell_is_the_best_row_of_its_method(task):
    for column, sparsity in enumerate(task.sparsities, 1):
        ranked = task.ranked(sparsity, task.phases[-1])
        best = next(point for point in ranked if point.method == "magnitude")
        values = best.metric(task.metric, sparsity, task.phases[-1]).values()
        assert cells(task, "magnitude")[column].text == task.metric.text(sum(values) / len(values))


def test_every_column_has_one_best(task):
    rows = headline(task, "magnitude").table.rows
    for column in range(1, len(task.sparsities) + 1):
        assert [row[column].mark for row in rows].count("best") == 1


def test_three_sentences(task):
    won, lead, price = headline(task, "magnitude").says
    assert won.startswith("Best, or tied with the best, of 5 sparsities: ")
    assert lead.startswith("Ahead of magnitude, each at its best row, in points: at 90 % ")
    assert " s a run of all levels" in price


def test_without_a_reference_nothing_is_ahead_of_it(task):
    assert not any(line.startswith("Ahead") for line in headline(task, None).says)
