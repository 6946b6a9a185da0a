"""Records in order: points, spreads, references, parts, sentences."""

import re

import pytest

from sparsekit.compare.plan import Comparison, Failure, Trial, Tuned, Tuning
from sparsekit.report import words
from sparsekit.report.attribution import counterpart, difference, parts, references, tied
from sparsekit.report.spread import Spread
from sparsekit.report.summary import summarise


def load(directory):
    return summarise(Comparison.load(directory))


@pytest.fixture
def task(desk, axes_of):
    """One task at 90 %: magnitude and fishleg, each bare and with its arms."""
    desk.point(axes_of("magnitude"), 0.40, 0.42, 0.44)
    desk.point(axes_of("magnitude", reconstruction="fisher"), 0.80, 0.81, 0.82)
    desk.point(axes_of("fishleg"), 0.60, 0.63, 0.66)
    desk.point(axes_of("fishleg", "joint"), 0.70, 0.72, 0.74)
    desk.point(axes_of("fishleg", reconstruction="fisher"), 0.81, 0.80, 0.82)
    desk.point(axes_of("fishleg", "joint", "fisher"), 0.82, 0.80, 0.82)
    return load(desk.done()).tasks[0]


def part_of(task, method, kind, compensation, reconstruction):
    for part in parts(task, "magnitude"):
        axes = part.point.axes if part.point else {}
        arms = axes.get("compensation"), axes.get("reconstruction")
        if (part.method, part.kind, *arms) == (method, kind, compensation, reconstruction):
            return part
    raise AssertionError("no such part")


def mean(part, task):
    return part.difference(task.metric, 0.9, "pruned").mean


def test_means_and_ranges_over_seeds(task):
    spread = Spread.of(task.points[0].metric(task.metric, 0.9, "pruned"))
    assert (spread.mean, spread.low, spread.high, spread.n) == (pytest.approx(0.42), 0.40, 0.44, 3)


def test_axes_that_do_not_vary_are_not_shown(task):
    assert task.shown == ("method", "compensation", "reconstruction")


def test_reconstruction_is_shown_even_where_it_does_not_vary(desk, axes_of):
    desk.point(axes_of("magnitude"), 0.5)
    assert load(desk.done()).tasks[0].shown == ("method", "reconstruction")


def test_a_point_without_the_references_compensation_meets_the_same_reconstruction(task):
    against = references(task, "magnitude")
    (joint,) = [
        point for point in against if point.axes["compensation"] == "joint" and point.axes["reconstruction"] == "fisher"
    ]
    assert against[joint].axes["reconstruction"] == "fisher"


def test_no_reference_has_no_counterpart(task):
    assert counterpart(task.points[0], []) is None


def test_differences_are_of_the_same_seeds(task):
    found = difference(task.points[2], task.points[0], task.metric, 0.9, "pruned")
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((0.21, 0.20, 0.22, 3))


def test_the_masks_part_is_bare_against_bare(task):
    assert mean(part_of(task, "fishleg", "mask", "none", "none"), task) == pytest.approx(0.63 - 0.42)


def test_compensations_part_is_at_the_same_reconstruction(task):
    assert mean(part_of(task, "fishleg", "compensation", "joint", "none"), task) == pytest.approx(0.72 - 0.63)
    assert mean(part_of(task, "fishleg", "compensation", "joint", "fisher"), task) == pytest.approx(0.01 / 3)


def test_reconstructions_part_is_at_the_same_compensation(task):
    assert mean(part_of(task, "fishleg", "reconstruction", "none", "fisher"), task) == pytest.approx(0.81 - 0.63)
    assert mean(part_of(task, "fishleg", "reconstruction", "joint", "fisher"), task) == pytest.approx(2.44 / 3 - 0.72)


def test_a_missing_arm_is_named(desk, axes_of):
    desk.point(axes_of("magnitude"), 0.4, 0.4, 0.4)
    desk.point(axes_of("obs", "joint"), 0.6, 0.6, 0.6)
    found = [part.missing for part in parts(load(desk.done()).tasks[0], "magnitude") if part.method == "obs"]
    assert found == [
        "no run without compensation and reconstruction",
        "no run without compensation at no reconstruction",
        "no run with reconstruction",
    ]


def test_ties_with_the_best(task):
    best, near = tied(task, 0.9, "pruned")
    assert best.label == "fishleg, joint compensation, fisher reconstruction"
    assert {point.label for point in near} == {
        "magnitude, no compensation, fisher reconstruction",
        "fishleg, no compensation, fisher reconstruction",
    }


def test_a_point_that_lacks_seeds_is_not_ranked(desk, axes_of):
    desk.point(axes_of("magnitude"), 0.4, 0.4, 0.4)
    desk.point(axes_of("obs"), 0.9, 0.9)
    task = load(desk.done()).tasks[0]
    assert [point.method for point in task.ranked(0.9, "pruned")] == ["magnitude"]


def test_second_order_information_with_reconstruction_is_called_a_tie(task):
    (line,) = [
        line for line in words.of_task(task, "magnitude") if "with fisher reconstruction" in line and "Second" in line
    ]
    assert "adds nothing (a tie) at 90 % (+0.3, " in line


def test_reconstruction_that_gives_more_than_compensation_is_said(task):
    (line,) = [line for line in words.of_task(task, "magnitude") if line.startswith("Fisher reconstruction alone")]
    assert line.endswith("in 1 method. 90 %: more in 1 (+9.0).")


def test_compensation_that_adds_nothing_is_said(task):
    (line,) = [line for line in words.by_method(task) if "reconstruction in place" in line]
    assert "adds nothing (a tie) at 90 % (+0.3, " in line


def test_one_seed_claims_nothing(desk, axes_of):
    desk.point(axes_of("magnitude"), 0.4)
    desk.point(axes_of("fishleg"), 0.9)
    lines = words.of_task(load(desk.done()).tasks[0], "magnitude")
    assert lines[0].startswith("With one seed no difference is claimed")
    assert not any(re.search(r"\b(gains|loses|tie|tied)\b", line) for line in lines)


def test_a_task_without_accuracy_is_of_its_loss_and_lower_is_better(desk, axes_of, level_record, run_record):
    for method, loss in (("magnitude", 200.0), ("fishleg", 70.0)):
        axes = axes_of(method, task="autoencoder")
        for seed in range(3):
            level = level_record(0.9, 0.5, pruned={"loss": loss + seed})
            desk.run(axes, seed, run_record(axes, seed, [level], dense={"loss": 58.6}))
    task = load(desk.done()).tasks[0]
    assert task.metric.name == "loss"
    assert task.ranked(0.9, "pruned")[0].method == "fishleg"


def test_states_of_runs(desk, axes_of, level_record, run_record):
    axes = axes_of("fishleg")
    desk.run(axes, 0, run_record(axes, 0, [level_record(0.9, 0.5)]))
    desk.run(axes, 1, failure=Failure(cause="memory", when=""))
    desk.run(axes, 2, run_record(axes, 2, [], status="running"))
    desk.run(axes, 3)
    summary = load(desk.done())
    assert [state.state for state in summary.states] == ["finished", "failed", "unfinished", "unfinished"]


def test_a_run_that_finished_after_it_failed_is_finished(desk, axes_of, level_record, run_record):
    axes = axes_of("fishleg")
    desk.run(axes, 0, run_record(axes, 0, [level_record(0.9, 0.5)]), Failure(cause="memory", when=""))
    assert load(desk.done()).count("finished") == 1


def test_another_dense_network_within_a_seed_is_a_departure(desk, axes_of, level_record, run_record):
    for method, digest in (("magnitude", "aa"), ("fishleg", "bb")):
        axes = axes_of(method)
        desk.run(axes, 0, run_record(axes, 0, [level_record(0.9, 0.5)], identity={"weights": digest}))
    (line,) = words.warnings(load(desk.done()))
    assert "not all methods started from the same dense weights (seeds 0)" in line


def test_a_task_of_which_nothing_finished_is_named(desk, axes_of):
    desk.point(axes_of("magnitude"), 0.5)
    desk.run(axes_of("magnitude", task="mnist"), 0)
    assert any(line.startswith("mnist: no run has finished") for line in words.warnings(load(desk.done())))


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("fishleg", {}, "tuned"),
        ("magnitude", {}, ""),
        ("obs", {}, "untuned"),
        ("diagonal", {}, "untuned"),
        ("mfac", {"preset": "mfac"}, "as published"),
    ],
)
def test_what_is_tuned(desk, axes_of, method, settings, expected):
    trial = Trial(damping=0.1, value=0.9)
    failed = Tuned(axes={"method": "obs"}, trials=[trial], damping=None)
    tuned = Tuned(axes={"method": "fishleg"}, trials=[trial], damping=0.1)
    desk.tuning = Tuning(objective="accuracy", tuned=[tuned, failed], untuned=["magnitude"])
    desk.point(axes_of("identity"), 0.5)
    desk.run(axes_of(method), 0, settings=settings)
    assert load(desk.done()).tasks[0].points[1].tuning == expected


def test_what_remains_of_multiply_adds(desk, axes_of, level_record, run_record):
    axes = axes_of("fishleg")
    desk.run(axes, 0, run_record(axes, 0, [level_record(0.9, 0.5, layer_sparsity={"a": 0.9})]))
    desk.plan = {"multiply_adds": {"digits": {"a": 300.0, "b": 100.0}}}
    task = load(desk.done()).tasks[0]
    (record,) = task.points[0].runs.values()
    assert task.remaining(record.levels[0]) == pytest.approx((30 + 100) / 400)  # b is not pruned and keeps all
