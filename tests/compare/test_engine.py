"""A comparison does what is not done, tells what failed, and loses nothing."""

import json
from concurrent.futures import Future

import pytest

from sparsekit.compare import engine, plan, tuning, work
from sparsekit.compare.engine import DEATHS, Engine
from sparsekit.compare.executors import Executor, WorkerDied
from sparsekit.compare.plan import Comparison, Tuning, read
from sparsekit.compare.spec import ComparisonSettings
from sparsekit.errors import RecordError
from sparsekit.registry.installed import load_registry
from sparsekit.runs.curvature_cache import SHARED_SECONDS, SharedStatistics
from sparsekit.runs.settings import merge
from sparsekit.runs.validation import validated

REGISTRY = load_registry()
MAGNITUDE = {"estimator": "identity", "saliency": "magnitude", "compensation": "none"}
OBS = {"estimator": {"name": "obs", "examples": 64}}
RUN = {"task": "digits", "schedule": "one-shot", "finetune": {"epochs": 0}, "sparsity": [0.5, 0.9]}


class Inline(Executor):
    """Jobs are done where they are submitted; `dying` are the first calls that take their worker with them."""

    def __init__(self, dying=0):
        self.dying, self.jobs = dying, []

    def submit(self, function, job):
        future = Future()
        self.jobs.append(job)
        if self.dying:
            self.dying -= 1
            future.set_exception(WorkerDied("the worker process ended with code -9"))
            return future
        try:
            future.set_result(function(job))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self):
        pass


def made(tmp_path, **changes):
    raw = {"name": "c", "run": RUN, "methods": {"obs": OBS, "magnitude": MAGNITUDE}, "seeds": [0], **changes}
    given = validated(ComparisonSettings, raw, "")
    seen = []
    return Engine(given, tmp_path / "c", REGISTRY, finished=lambda run: seen.append(run.directory)), seen


def failing(monkeypatch, error):
    """The runs of `obs` fail."""
    whole = work.execute

    def execute(resolved, *args, **more):
        if resolved.estimator.cls.name == "obs":
            raise error
        return whole(resolved, *args, **more)

    monkeypatch.setattr(work, "execute", execute)


def test_every_run_of_the_plan_is_done(tmp_path):
    comparison, seen = made(tmp_path, seeds=[0, 1])
    found = comparison.run(Inline())
    assert all(found.finished(run) for run in found.plan.runs)
    assert sorted(seen) == sorted(run.directory for run in found.plan.runs)
    assert len(seen) == 4


def test_what_is_finished_is_not_done_again(tmp_path):
    made(tmp_path)[0].run(Inline())
    again, seen = made(tmp_path)
    executor = Inline()
    again.run(executor)
    assert executor.jobs == []
    assert len(seen) == 2  # and told, so that what MLflow has missed it hears now


def test_a_failure_is_told_and_stops_nobody(tmp_path, monkeypatch):
    failing(monkeypatch, RecordError("the disk is full"))
    found = made(tmp_path)[0].run(Inline())
    [failed] = found.failures
    assert found.failures[failed].cause == "the disk is full"
    assert [run.axes["method"] for run in found.plan.runs if found.finished(run)] == ["magnitude"]


def test_a_bug_is_told_with_its_traceback(tmp_path, monkeypatch):
    failing(monkeypatch, ZeroDivisionError("oh"))
    [failure] = made(tmp_path)[0].run(Inline()).failures.values()
    assert failure.cause == "ZeroDivisionError: oh"
    assert "in execute" in failure.details


def test_a_failed_run_is_done_again_on_request_alone(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        failing(patch, RecordError("the disk is full"))
        made(tmp_path)[0].run(Inline())
    executor = Inline()
    assert made(tmp_path)[0].run(executor).failures
    assert executor.jobs == []
    found = made(tmp_path)[0].run(Inline(), again=True)
    assert not found.failures
    assert all(found.finished(run) for run in found.plan.runs)


@pytest.mark.parametrize("damage", ["record.json", "checkpoint/00001.safetensors"])
def test_a_damaged_file_is_a_failure_that_is_mended_on_request(tmp_path, damage):
    first = made(tmp_path)[0].run(Inline())
    [run] = [run for run in first.plan.runs if run.axes["method"] == "obs"]
    path = first.directory / run.directory
    before = [level.pruned for level in first.records[run.directory].levels]
    if damage != "record.json":  # then it is a run that has not ended
        record = json.loads((path / "record.json").read_text())
        (path / "record.json").write_text(json.dumps({**record, "status": "running"}))
        (path / damage).parent.mkdir()
    (path / damage).write_text("{")
    assert run.directory in made(tmp_path)[0].run(Inline()).failures
    found = made(tmp_path)[0].run(Inline(), again=True)
    assert [level.pruned for level in found.records[run.directory].levels] == before


def test_a_worker_that_died_is_replaced(tmp_path):
    found = made(tmp_path)[0].run(Inline(dying=DEATHS - 1))
    assert all(found.finished(run) for run in found.plan.runs)


def test_a_run_that_kills_its_worker_each_time_is_a_failure(tmp_path):
    class Deadly(Inline):
        def submit(self, function, job):
            self.dying = int(job.runs[0].axes["method"] == "obs")
            return super().submit(function, job)

    found = made(tmp_path)[0].run(Deadly())
    [failure] = found.failures.values()
    assert failure.cause == f"the worker process ended with code -9 ({DEATHS} times)"
    assert [run.axes["method"] for run in found.plan.runs if found.finished(run)] == ["magnitude"]


def test_two_comparisons_in_one_directory_are_refused(tmp_path):
    first, second = made(tmp_path)[0], made(tmp_path)[0]
    with first.lock(), pytest.raises(RecordError, match="another 'sparsekit compare' is at work in"), second.lock():
        pass


def test_a_directory_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "c").write_text("a file")
    with (
        pytest.raises(RecordError, match="cannot write to '.*/c': .*; give another --output"),
        made(tmp_path)[0].lock(),
    ):
        pass


def test_runs_that_differ_after_the_estimate_share_it(tmp_path):
    executor = Inline()
    comparison, _ = made(tmp_path, axes={"compensation": ["independent", "joint"], "reconstruction": ["none"]})
    found = comparison.run(executor)
    assert sorted(len(job.runs) for job in executor.jobs) == [1, 2]
    shared = [SHARED_SECONDS in found.records[r.directory].steps[0].curvature for r in found.plan.runs]
    assert shared == [False, True, False]


def test_sharing_changes_no_result(tmp_path):
    axes = {"compensation": ["independent", "joint"]}
    together = made(tmp_path / "a", axes=axes)[0].run(Inline())
    [alone] = [run for run in together.plan.runs if run.axes["compensation"] == "joint"]
    record = work.one(tmp_path / "b", alone.settings, work.SharedStatistics())
    assert record.levels == together.records[alone.directory].levels
    assert record.key == together.records[alone.directory].key


def test_a_failure_of_an_earlier_time_is_forgotten_once_a_run_is_finished(tmp_path):
    found = made(tmp_path)[0].run(Inline())
    work.write(plan.Failure(cause="an earlier one", when=""), work.failure_path(found.directory, found.plan.runs[0]))
    assert Comparison.load(found.directory).failures == {}


def test_a_damaged_failure_file_is_a_failure(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        failing(patch, RecordError("the disk is full"))
        made(tmp_path)[0].run(Inline())
    [path] = (tmp_path / "c" / "failures").glob("*.json")
    path.write_text("{")
    [failure] = Comparison.load(tmp_path / "c").failures.values()
    assert "fields are not valid" in failure.cause
    found = made(tmp_path)[0].run(Inline(), again=True)
    assert all(found.finished(run) for run in found.plan.runs)


def test_the_runs_behind_one_that_kills_its_worker_are_done(tmp_path):
    class Deadly(Inline):
        def submit(self, function, job):
            self.dying = int(job.runs[0].axes["compensation"] == "independent")
            return super().submit(function, job)

    comparison, _ = made(tmp_path, axes={"compensation": ["independent", "joint"]})
    found = comparison.run(Deadly())
    [failed] = found.failures
    [run] = [run for run in found.plan.runs if run.directory == failed]
    assert run.axes["compensation"] == "independent"
    assert sum(found.finished(run) for run in found.plan.runs) == 2


def test_a_run_that_lands_elsewhere_than_planned_is_a_failure(tmp_path):
    found = made(tmp_path)[0].run(Inline())
    with pytest.raises(RecordError, match="it sees another device, other data or other weights"):
        work.one(tmp_path / "c" / "runs", found.plan.runs[0].settings, work.SharedStatistics(), "runs/digits-obs-0")


def test_every_method_gets_the_same_trials(tmp_path):
    methods = {"obs": OBS, "diagonal": {"estimator": {"name": "diagonal", "examples": 64}}, "magnitude": MAGNITUDE}
    comparison, _ = made(tmp_path, methods=methods, tune={"trials": 3, "sparsity": [0.8]})
    comparison.run(Inline())
    found = read(Tuning, tmp_path / "c" / "tuning.json")
    assert [[t.damping for t in tuned.trials] for tuned in found.tuned] == [[0.001, 0.1, 10.0]] * 2
    assert found.untuned == ["magnitude"]


def test_runs_are_made_with_the_damping_that_was_found(tmp_path):
    found = made(tmp_path, tune={"trials": 3})[0].run(Inline())
    [tuned] = found.tuning.tuned
    best = max(tuned.trials, key=lambda trial: trial.value)
    assert tuned.damping == best.damping
    [run] = [run for run in found.plan.runs if run.axes["method"] == "obs"]
    assert found.records[run.directory].settings["estimator"]["damping"] == best.damping


def test_trials_are_measured_on_the_tuning_half(tmp_path):
    made(tmp_path, tune={"trials": 2})[0].run(Inline())
    records = [json.loads(p.read_text()) for p in (tmp_path / "c" / "trials").glob("*/record.json")]
    assert [record["settings"]["split"] for record in records] == ["tuning"] * 2


def test_tuning_is_not_repeated(tmp_path, monkeypatch):
    made(tmp_path, tune={"trials": 2})[0].run(Inline())
    monkeypatch.setattr(tuning, "search", lambda job: pytest.fail("searched again"))
    made(tmp_path, tune={"trials": 2})[0].run(Inline())


@pytest.mark.parametrize(
    ("error", "cause"), [(RecordError("too large"), "too large"), (RuntimeError("oh"), "RuntimeError: oh")]
)
def test_a_trial_that_fails_is_kept_with_its_cause_until_it_is_asked_for_again(tmp_path, monkeypatch, error, cause):
    whole = tuning.one

    def one(output, settings, *args, **more):
        if settings["estimator"]["damping"] == 10.0:
            raise error
        return whole(output, settings, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "one", one)
        found = made(tmp_path, tune={"trials": 2})[0].run(Inline())
    [tuned] = found.tuning.tuned
    assert [trial.cause for trial in tuned.trials] == ["", cause]
    assert tuned.damping == 0.001
    [kept] = made(tmp_path, tune={"trials": 2})[0].run(Inline()).tuning.tuned
    assert kept == tuned
    [again] = made(tmp_path, tune={"trials": 2})[0].run(Inline(), again=True).tuning.tuned
    assert [trial.cause for trial in again.trials] == ["", ""]


class DeadlySearches(Inline):
    """Searches take their worker with them; with `trial`, a trial of theirs is done before."""

    def __init__(self, deaths, trial=False):
        super().__init__()
        self.deaths, self.trial = deaths, trial

    def submit(self, function, job):
        if function is not tuning.search or not self.deaths:
            return super().submit(function, job)
        self.deaths -= 1
        if self.trial:
            settings = merge(job.settings, tuning.damped(0.001 * 2**self.deaths))
            work.one(job.directory / plan.TRIALS, settings, SharedStatistics())
        self.dying = 1
        return super().submit(function, job)


def test_a_search_that_kills_its_workers_is_a_failure_of_its_runs(tmp_path):
    found = made(tmp_path, tune={"trials": 2})[0].run(DeadlySearches(DEATHS))
    [failure] = found.failures.values()
    assert failure.cause.endswith(
        f"no damping was found for it: the worker process ended with code -9 ({DEATHS} times)"
    )
    assert [run.axes["method"] for run in found.plan.runs if found.finished(run)] == ["magnitude"]


def test_a_run_with_the_default_damping_does_not_stand_for_one_whose_search_failed(tmp_path):
    made(tmp_path)[0].run(Inline())
    found = made(tmp_path, tune={"trials": 2})[0].run(DeadlySearches(DEATHS))
    assert [run.axes["method"] for run in found.plan.runs if found.finished(run)] == ["magnitude"]


def test_a_search_that_failed_is_done_again_on_request_alone(tmp_path):
    made(tmp_path, tune={"trials": 2})[0].run(DeadlySearches(DEATHS))
    assert made(tmp_path, tune={"trials": 2})[0].run(Inline()).failures
    found = made(tmp_path, tune={"trials": 2})[0].run(Inline(), again=True)
    assert all(found.finished(run) for run in found.plan.runs)


def test_a_search_goes_on_however_often_its_worker_dies_where_a_trial_was_done_in_between(tmp_path):
    found = made(tmp_path, tune={"trials": 2})[0].run(DeadlySearches(DEATHS + 1, trial=True))
    assert not found.failures


def test_multiply_adds_are_those_of_the_layers(tmp_path):
    found = made(tmp_path)[0].run(Inline()).plan
    model = REGISTRY.get("task", "digits")(REGISTRY.get("task", "digits").Settings()).network()
    sizes = {f"{name}.weight": m.weight.numel() for name, m in model.named_modules() if hasattr(m, "weight")}
    linear = {name: count for name, count in found.multiply_adds["digits"].items() if name in sizes}
    assert linear
    assert all(count % sizes[name] == 0 for name, count in linear.items())


def test_the_plan_says_where_each_record_lies(tmp_path):
    made(tmp_path)[0].run(Inline())
    found = Comparison.load(tmp_path / "c")
    assert {run.directory for run in found.plan.runs} == set(found.records)


def test_no_comparison_is_said(tmp_path):
    with pytest.raises(RecordError, match="there is no comparison in"):
        Comparison.load(tmp_path)


def test_a_sketch_counts_runs_and_trials():
    raw = {"name": "c", "run": RUN, "methods": {"obs": OBS, "magnitude": MAGNITUDE}, "tune": {"trials": 4}}
    found = engine.sketch(validated(ComparisonSettings, raw, ""), REGISTRY)
    assert (found.runs, found.trials) == (6, 4)
    assert found.seconds > 0
