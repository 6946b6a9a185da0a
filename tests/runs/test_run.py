import json
import re
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file

from sparsekit.compare.upload import track
from sparsekit.errors import DataError, RecordError
from sparsekit.methods.interfaces import CompensationSettings
from sparsekit.methods.schedules import Step
from sparsekit.pruning.events import LayerReconstructed, StepCompleted
from sparsekit.registry.installed import load_registry
from sparsekit.runs import tracking, tracking_store
from sparsekit.runs.degraded import degradations
from sparsekit.runs.run import execute
from sparsekit.runs.settings import resolve
from sparsekit.runs.tracking_store import default_uri
from sparsekit.tasks import Digits

REGISTRY = load_registry()


def settings(tmp_path, **changes):
    raw = {
        "estimator": {"name": "fishleg", "examples": 128, "auxiliary_steps": 2, "check_every": 1},
        "sparsity": [0.6, 0.9],
        "steps": 2,
        "finetune": {"epochs": 0.3},
        "output": str(tmp_path),
        "tracking": {"enabled": False},
    }
    return resolve(raw | changes, REGISTRY)


def result(outcome):
    return load_file(outcome.path / "weights.safetensors")


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def timeless(value):
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key != "seconds"}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def interrupt_after(step):
    def listener(event):
        if isinstance(event, StepCompleted) and event.step.index == step:
            raise KeyboardInterrupt

    return listener


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"estimator": {"name": "obs", "examples": 128}, "finetune": {"epochs": 0}, "schedule": "one-shot"},
        {
            "estimator": {
                "name": "fishleg",
                "examples": 128,
                "refresh": "auxiliary",
                "auxiliary_steps": 4,
            }
        },
    ],
    ids=["gradual", "independent levels", "learned"],
)
def test_resume_equals_uninterrupted(tmp_path, changes):
    whole = execute(settings(tmp_path / "a", **changes), REGISTRY)
    with pytest.raises(KeyboardInterrupt):
        execute(settings(tmp_path / "b", **changes), REGISTRY, listener=interrupt_after(1))
    resumed = execute(settings(tmp_path / "b", **changes), REGISTRY, resume=True)
    assert same(result(whole), result(resumed))
    assert [level.pruned for level in whole.record.levels] == [level.pruned for level in resumed.record.levels]


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    first, second = (execute(settings(tmp_path / name), REGISTRY) for name in "ab")
    assert same(result(first), result(second))


def test_another_seed_gives_other_numbers_and_another_directory(tmp_path):
    first, second = execute(settings(tmp_path), REGISTRY), execute(settings(tmp_path, seed=1), REGISTRY)
    assert first.path != second.path
    assert not same(result(first), result(second))


def test_an_unfinished_run_is_not_overwritten(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        execute(settings(tmp_path), REGISTRY, listener=interrupt_after(1))
    with pytest.raises(RecordError, match="go on with --resume, or start again with --fresh"):
        execute(settings(tmp_path), REGISTRY)


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {"reconstruction": {"how": "fisher", "examples": 192}},
        {
            "reconstruction": {"how": "fisher", "examples": 192, "sweeps": 2},
            "estimator": {"name": "obs", "examples": 128},
            "finetune": {"epochs": 0},
            "schedule": "one-shot",
        },
        {
            "reconstruction": {"how": "layerwise", "examples": 192, "when": "level"},
            "estimator": {"name": "fishleg", "examples": 128, "auxiliary_steps": 4},
        },
    ],
    ids=["gradual, the estimator's weighting", "independent levels, measured weighting", "layerwise, learned"],
)
def test_a_run_resumes_between_two_layers(tmp_path, monkeypatch, changes, at):
    monkeypatch.setattr("sparsekit.runs.driver.SAVE_EVERY", -1.0)
    whole = execute(settings(tmp_path / "a", **changes), REGISTRY)
    seen = []

    def listener(event):
        seen.extend([event] if isinstance(event, LayerReconstructed) else [])
        if len(seen) == 5 + at:  # in the second step that fits layers, the digits' network having five
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(settings(tmp_path / "b", **changes), REGISTRY, listener=listener)
    resumed = execute(settings(tmp_path / "b", **changes), REGISTRY, resume=True)
    assert same(result(whole), result(resumed))
    steps = [str(timeless(done.record.model_dump()["steps"])) for done in (whole, resumed)]  # NaN is not NaN
    assert steps[0] == steps[1]


def test_predicted_and_measured_increase_are_those_of_the_cut_alone(tmp_path):
    changes = {"finetune": {"epochs": 0}, "schedule": "one-shot"}
    plain = execute(settings(tmp_path, **changes, reconstruction="none"), REGISTRY).record
    fitted = execute(settings(tmp_path, **changes, reconstruction={"how": "layerwise"}), REGISTRY).record
    for a, b in zip(plain.levels, fitted.levels, strict=True):
        assert (a.predicted_increase, a.measured_increase) == (b.predicted_increase, b.measured_increase)
        assert a.reconstructed_increase == 0 > b.reconstructed_increase
    assert all(fit.held_out_after < fit.held_out_before for fit in fitted.steps[-1].reconstruction.layers)
    assert fitted.seconds["reconstruction"] > 0


def test_reconstruction_only_where_a_level_is_reached(tmp_path):
    changes = {"reconstruction": {"how": "layerwise", "when": "level", "examples": 192}}
    record = execute(settings(tmp_path, **changes), REGISTRY).record
    assert [step.reconstruction is not None for step in record.steps] == [False, True, False, True]


def test_reconstruction_with_more_examples_than_there_are_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"reconstruction needs 5000 .* set reconstruction\.examples=1[0-9]+ or less"):
        execute(settings(tmp_path, reconstruction={"how": "layerwise", "examples": 5000}), REGISTRY)


def test_a_run_that_died_before_its_first_step_resumes_from_the_start(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        execute(settings(tmp_path), REGISTRY, listener=lambda event: (_ for _ in ()).throw(KeyboardInterrupt))
    assert execute(settings(tmp_path), REGISTRY, resume=True).record.status == "finished"


def test_where_results_go_does_not_change_a_runs_identity(tmp_path):
    first, second = (execute(settings(tmp_path / name), REGISTRY) for name in "ab")
    assert first.record.key == second.record.key


def test_the_record_on_disk_is_the_one_returned_and_no_checkpoint_stays(tmp_path):
    outcome = execute(settings(tmp_path), REGISTRY)
    on_disk = json.loads((outcome.path / "record.json").read_text())
    assert on_disk["key"] == outcome.record.key
    assert on_disk["status"] == "finished"
    assert not (outcome.path / "checkpoint").exists()


def test_joint_compensation_predicts_no_more_than_none(tmp_path):
    one_cut = {"schedule": "one-shot", "finetune": {"epochs": 0}}
    joint = execute(settings(tmp_path, **one_cut), REGISTRY)
    none = execute(settings(tmp_path, **one_cut, compensation="none"), REGISTRY)
    for a, b in zip(joint.record.levels, none.record.levels, strict=True):
        assert a.predicted_increase <= b.predicted_increase


def completed(**changes):
    step = Step(index=2, sparsity=0.5, restart=False, refresh=True, finetune=False, level=0, completes_level=True)
    given = {field.name: None for field in fields(StepCompleted)}
    given |= {
        "step": step,
        "loss": 0.5,
        "predicted_increase": 0.1,
        "residual": 0.0,
        "fell_back": False,
        "collapsed": (),
    }
    return StepCompleted(**given | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"predicted_increase": -0.49}, []),
        ({"predicted_increase": float("nan")}, []),
        ({"predicted_increase": -0.51}, ["would take it below zero from 0.5.*compensation.first_order < 1"]),
        ({"fell_back": True}, ["joint compensation came out worse than none"]),
        ({"collapsed": ("all 4 weights of 'a' are removed",)}, ["all 4 weights of 'a' are removed$"]),
    ],
    ids=["", "a possible decrease", "unknown", "an impossible decrease", "fell back", "collapsed"],
)
def test_what_went_less_well_is_listed(changes, expected):
    found = degradations(completed(**changes), CompensationSettings())
    assert len(found) == len(expected)
    assert all(re.match(f"step 2: .*{text}", line) for text, line in zip(expected, found, strict=True))


def test_a_resumed_estimator_says_where_its_state_lies(tmp_path, monkeypatch):
    asked, base = [], REGISTRY.get("estimator", "obs")

    def state_device(self, name, tensor, device):
        asked.append((name, device.type))
        return device

    monkeypatch.setattr(base, "state_device", state_device)
    given = settings(tmp_path, estimator={"name": "obs", "examples": 32}, finetune={"epochs": 0})
    with pytest.raises(KeyboardInterrupt):
        execute(given, REGISTRY, listener=interrupt_after(1))
    assert not asked
    execute(given, REGISTRY, resume=True)
    assert asked == [("mean_diagonal", "cpu"), ("rows", "cpu")]


def test_a_tracker_that_does_not_answer_stops_nothing_and_is_told_later(tmp_path):
    tracked = {"tracking": {"uri": "http://me:hunter2@127.0.0.1:9"}}
    quick = {"estimator": "obs", "schedule": "one-shot", "steps": 1, "finetune": {"epochs": 0}}
    outcome = execute(settings(tmp_path, **quick, **tracked), REGISTRY)
    [said] = outcome.record.degraded
    assert outcome.record.status == "finished"
    assert said.startswith("tracking: tracking stopped while starting the run: no MLflow server answers at")
    assert said.endswith(f"'sparsekit track {outcome.path}' tells MLflow later")
    assert outcome.tracking_uri is None
    for name in ("record.json", "run.yaml"):
        assert "hunter2" not in (outcome.path / name).read_text()
    assert track(outcome.path, default_uri(tmp_path / "later"), "x") == (1, 1)


@pytest.mark.parametrize("split", ["train", "reporting"])
def test_a_split_without_examples_is_refused_before_any_work(tmp_path, monkeypatch, split):
    size = Digits.size
    monkeypatch.setattr(Digits, "size", lambda self, asked: 0 if asked == split else size(self, asked))
    with pytest.raises(DataError, match=f"no examples in its {split} split"):
        execute(settings(tmp_path), REGISTRY)
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_answers_later_is_told_the_steps_before(tmp_path):
    dead, alive = ({"tracking": {"uri": uri}} for uri in ("http://127.0.0.1:9", default_uri(tmp_path / "alive")))
    with pytest.raises(KeyboardInterrupt):
        execute(settings(tmp_path, **dead), REGISTRY, listener=interrupt_after(1))
    outcome = execute(settings(tmp_path, **alive), REGISTRY, resume=True)
    client = tracking_store.client_of(default_uri(tmp_path / "alive"))
    (run,) = client.search_runs([client.get_experiment_by_name("sparsekit").experiment_id])
    steps = client.get_metric_history(run.info.run_id, "predicted_increase")
    assert [metric.step for metric in steps] == [step.index for step in outcome.record.steps]
    (dense,) = client.get_metric_history(run.info.run_id, "dense/loss")
    assert dense.value == outcome.record.dense["loss"]


def test_a_tracker_that_was_deaf_for_a_step_is_told_it_once_on_resume(tmp_path, monkeypatch):
    """It started, failed from the second step on, and answers again after an interruption."""
    uri, tell = default_uri(tmp_path / "mlflow"), tracking.Tracker.metrics

    def deaf(self, values, step):
        if step >= 1:
            self.failure = "it is deaf"
        elif self.failure is None:
            tell(self, values, step)

    tracked = settings(tmp_path, tracking={"uri": uri})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tracking.Tracker, "metrics", deaf)
        execute(tracked, REGISTRY, listener=interrupt_after(2))
    outcome = execute(tracked, REGISTRY, resume=True)
    client = tracking_store.client_of(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("sparsekit").experiment_id])
    steps = client.get_metric_history(run.info.run_id, "predicted_increase")
    assert [metric.step for metric in steps] == [step.index for step in outcome.record.steps]


def test_a_run_that_mlflow_does_not_have_is_nowhere_in_it_when_it_is_repeated(tmp_path):
    dead = settings(tmp_path, tracking={"uri": "http://127.0.0.1:9"})
    first, again = execute(dead, REGISTRY), execute(dead, REGISTRY)
    assert (first.tracking_uri, again.tracking_uri, again.repeated) == (None, None, True)
