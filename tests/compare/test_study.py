import pytest
from pydantic import ValidationError

from sparsekit.compare.engine import Engine
from sparsekit.compare.plan import Comparison
from sparsekit.compare.study import StudySettings, comparison
from sparsekit.errors import SettingsError
from sparsekit.registry.installed import load_registry
from sparsekit.report import write_report
from sparsekit.runs.validation import validated

REGISTRY = load_registry()
CRITERIA = {"MP": {"saliency": "magnitude"}, "LM": {"saliency": "linear-model"}, "OBD": {"saliency": "obd"}}
RUN = {
    "task": "digits",
    "sparsity": 0.9,
    "estimator": {"examples": 64},
    "finetune": {"epochs": 1, "learning_rate": 0.01},
}
DENSE = ("loss", "accuracy")
FEW = {"criteria": {"LM": {"saliency": "linear-model"}}, "penalties": [0.0, 0.1], "substeps": [1, 2]}  # four networks


def file(**changes):
    given = {"name": "s", "run": RUN, "criteria": CRITERIA, "substeps": [1, 3], "penalties": [0, 0.1], "seeds": [0]}
    return validated(StudySettings, {**given, **changes}, "")


def test_each_criterion_is_a_method_at_each_penalty():
    found = comparison(file(), REGISTRY)
    assert list(found.methods) == ["MP", "LM, λ = 0", "LM, λ = 0.1", "OBD, λ = 0", "OBD, λ = 0.1"]
    assert found.methods["OBD, λ = 0.1"]["saliency"] == {"name": "obd", "penalty": 0.1}
    assert found.axes == {"substeps": [1, 3]}


def test_magnitude_is_done_once_because_no_sub_step_changes_it():
    assert comparison(file(), REGISTRY).methods["MP"]["substeps"] == 1


def test_magnitude_with_an_estimator_is_done_at_each_pi():
    criteria = {"M": {"saliency": "magnitude", "estimator": "diagonal", "compensation": "joint"}}
    found = comparison(file(criteria=criteria, substeps=[1, 2, 3, 4]), REGISTRY)
    assert "substeps" not in found.methods["M"]


def test_further_axes_are_those_of_a_comparison():
    axes = {"spacing": ["exponential", "linear"]}
    assert comparison(file(axes=axes), REGISTRY).axes == {"substeps": [1, 3], **axes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"substeps": [0]}, "substeps.*greater than or equal to 1"),
        ({"penalties": [-1]}, "penalties.*greater than or equal to 0"),
        ({"criteria": {}}, "criteria"),
        ({"seeds": []}, "seeds"),
    ],
)
def test_values_out_of_range_are_refused_by_name(changes, message):
    with pytest.raises((SettingsError, ValidationError), match=f"(?s){message}"):
        file(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"substeps": [1, 1]}, "substeps = .* names a value twice"),
        ({"penalties": [0.1, 0.1]}, "penalties = .* names a value twice"),
        ({"criteria": {"A, λ = 3": {"saliency": "obd"}}}, "which parts a name from its λ"),
        ({"criteria": {"MP": CRITERIA["MP"]}}, "1 networks of a seed, and correlations need 4 at least"),
        ({"criteria": {"LM": CRITERIA["LM"]}, "penalties": [0]}, "2 networks of a seed"),
        ({"run": {**RUN, "estimator": {"examples": 0}}}, "saliency 'linear-model' needs examples"),
    ],
)
def test_studies_that_could_answer_nothing_are_refused_in_one_sentence(changes, message):
    with pytest.raises(SettingsError, match=message) as refused:
        comparison(file(**changes), REGISTRY)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def done(tmp_path_factory, inline):
    directory = tmp_path_factory.mktemp("study") / "s"
    given = comparison(file(**FEW, seeds=[0, 1]), REGISTRY)
    Engine(given, directory, REGISTRY).run(inline)
    return given, directory


def test_each_seed_has_a_dense_network_of_its_own(done):
    found = Comparison.load(done[1])
    dense = {run.seed: found.records[run.directory].dense["loss"] for run in found.plan.runs}
    assert len(set(dense.values())) == 2
    assert found.plan.seeds_share == []


def test_the_loss_is_measured_on_all_splits(done):
    found = Comparison.load(done[1])
    [level] = found.records[found.plan.runs[0].directory].levels
    for metrics in (level.pruned, level.finetuned):
        assert set(metrics) == {
            f"{split}{name}" for split in ("", "train/", "tuning/") for name in ("loss", "accuracy")
        }


def test_killed_and_continued_it_gives_the_same_figures(done, inline):
    given, directory = done
    csv = (write_report(directory).parent / "results.csv").read_bytes()
    found = Comparison.load(directory)
    lost, kept = found.plan.runs[0], found.plan.runs[1:]
    for path in (directory / lost.directory).iterdir():
        path.unlink()
    before = {run.directory: (directory / run.directory / "record.json").stat().st_mtime_ns for run in kept}
    Engine(given, directory, REGISTRY).run(inline)
    assert before == {run.directory: (directory / run.directory / "record.json").stat().st_mtime_ns for run in kept}
    assert (write_report(directory).parent / "results.csv").read_bytes() == csv


def test_a_cell_that_fails_is_told_and_stops_no_other(tmp_path, inline):
    criteria = {**FEW["criteria"], "bad": {"saliency": "random", "finetune": {"learning_rate": 1e12}}}
    given = comparison(file(**{**FEW, "criteria": criteria}), REGISTRY)
    found = Engine(given, tmp_path / "s", REGISTRY).run(inline)
    assert len(found.failures) == 1
    assert sum(map(found.finished, found.plan.runs)) == len(found.plan.runs) - 1
    assert "Loss modelling" in write_report(tmp_path / "s").read_text()
