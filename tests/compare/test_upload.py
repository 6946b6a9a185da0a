"""MLflow is told of finished runs, once, under one parent; what it does wrong is nobody's trouble."""

import shutil

import pytest

from sparsekit.compare.engine import Engine
from sparsekit.compare.spec import ComparisonSettings
from sparsekit.compare.upload import PARENT, Uploader, track
from sparsekit.errors import RecordError
from sparsekit.registry.installed import load_registry
from sparsekit.runs import tracking_store
from sparsekit.runs.addresses import TrackingError
from sparsekit.runs.tracking_store import default_uri, initialise
from sparsekit.runs.validation import validated

REFUSED = "http://127.0.0.1:9"  # nothing listens on the discard port


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, inline):
    raw = {
        "name": "c",
        "run": {"task": "digits", "schedule": "one-shot", "finetune": {"epochs": 0}, "sparsity": [0.5, 0.9]},
        "methods": {"magnitude": {"estimator": "identity", "saliency": "magnitude", "compensation": "none"}},
        "seeds": [0, 1],
    }
    given = validated(ComparisonSettings, raw, "")
    return Engine(given, tmp_path_factory.mktemp("out") / "c", load_registry()).run(inline)


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    address = default_uri(tmp_path_factory.mktemp("mlflow"))
    initialise(address)
    return address


@pytest.fixture
def runs(uri):
    def found(experiment):
        client = tracking_store.client_of(uri)
        return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])

    return found


def test_a_comparison_is_a_parent_and_its_runs(comparison, uri, runs):
    assert track(comparison.directory, uri, "a") == (2, 2)
    [parent] = [run for run in runs("a") if PARENT not in run.data.tags]
    children = [run for run in runs("a") if run.data.tags.get(PARENT) == parent.info.run_id]
    assert parent.info.run_name == "c"
    assert len(children) == 2
    assert {run.info.status for run in children} == {"FINISHED"}


def test_a_child_has_the_records_figures(comparison, uri, runs):
    track(comparison.directory, uri, "b")
    [child, _] = [run for run in runs("b") if PARENT in run.data.tags]
    [record] = [r for r in comparison.records.values() if r.key == child.data.tags["key"]]
    assert child.data.metrics["final/pruned_accuracy"] == record.levels[-1].pruned["accuracy"]
    assert child.data.metrics["removal/residual"] == record.steps[-1].residual


def test_what_mlflow_has_it_is_not_told_again(comparison, uri, runs):
    track(comparison.directory, uri, "c")
    assert track(comparison.directory, uri, "c") == (0, 2)
    assert len(runs("c")) == 3


def test_the_parent_has_the_plan(comparison, uri, runs):
    track(comparison.directory, uri, "d")
    [parent] = [run for run in runs("d") if PARENT not in run.data.tags]
    assert "plan.json" in [file.path for file in tracking_store.client_of(uri).list_artifacts(parent.info.run_id)]


def test_runs_on_their_own_have_no_parent(comparison, uri, runs):
    assert track(comparison.directory / "runs", uri, "e") == (2, 2)
    assert not any(PARENT in run.data.tags for run in runs("e"))


def test_one_run_may_be_told(comparison, uri):
    assert track(comparison.directory / comparison.plan.runs[0].directory, uri, "f") == (1, 1)


def test_nothing_to_tell_is_said(tmp_path, uri):
    with pytest.raises(RecordError, match="there are no finished runs in"):
        track(tmp_path, uri, "g")


def test_a_server_that_refuses_is_said(comparison):
    with pytest.raises(TrackingError, match="no MLflow server answers at"):
        track(comparison.directory, REFUSED, "h")


def test_beside_the_work_a_server_that_refuses_is_kept_for_the_end(comparison):
    uploader = Uploader(REFUSED, "i", comparison.directory, "c")
    uploader.put(comparison.directory / comparison.plan.runs[0].directory)
    assert "no MLflow server answers at" in uploader.close([])


def test_beside_the_work_runs_are_told_as_they_finish(comparison, uri, runs):
    uploader = Uploader(uri, "j", comparison.directory, "c")
    for run in comparison.plan.runs:
        uploader.put(comparison.directory / run.directory)
    assert uploader.close([]) is None
    assert len(runs("j")) == 3


def test_a_run_that_is_gone_is_kept_for_the_end(comparison, uri, tmp_path):
    copy = tmp_path / "gone"
    shutil.copytree(comparison.directory / comparison.plan.runs[0].directory, copy)
    (copy / "record.json").write_text("{")
    uploader = Uploader(uri, "k", comparison.directory, "c")
    uploader.put(copy)
    assert "is not a whole record" in uploader.close([])
