"""A comparison's file is expanded, judged against the protocol, and refused in a sentence where it cannot be run."""

import pytest

from sparsekit.compare.spec import ComparisonSettings, departures, expand, warnings
from sparsekit.errors import PluginError, SettingsError
from sparsekit.registry.installed import load_registry
from sparsekit.runs.validation import validated

REGISTRY = load_registry()
ONE_CUT = {"task": "digits", "schedule": "one-shot", "finetune": {"epochs": 0}, "sparsity": [0.5, 0.6, 0.7, 0.8, 0.9]}
MAGNITUDE = {"estimator": "identity", "saliency": "magnitude", "compensation": "none"}


def given(**changes):
    raw = {"name": "c", "run": ONE_CUT, "methods": {"obs": {"estimator": "obs"}, "magnitude": MAGNITUDE}, **changes}
    return validated(ComparisonSettings, raw, "")


def points(**changes):
    return expand(given(**changes), REGISTRY)


def told(**changes):
    file = given(**changes)
    return " ".join(warnings(file, expand(file, REGISTRY)))


def test_methods_are_crossed_with_axes():
    found = points(axes={"compensation": ["independent", "joint"], "reconstruction": ["none", "layerwise"]})
    assert [(p.axes["compensation"], p.axes["reconstruction"]) for p in found if p.method == "obs"] == [
        ("independent", "none"),
        ("independent", "layerwise"),
        ("joint", "none"),
        ("joint", "layerwise"),
    ]


def test_an_axis_that_a_method_sets_is_fixed_for_it():
    found = points(axes={"compensation": ["independent", "joint"]})
    assert [p.axes["compensation"] for p in found if p.method == "magnitude"] == ["none"]


def test_an_axis_may_be_labels_and_settings():
    found = points(axes={"cuts": {"one": {"substeps": 1}, "four": {"substeps": 4}}})
    assert [(p.axes["cuts"], p.resolved.settings.substeps) for p in found if p.method == "obs"] == [
        ("one", 1),
        ("four", 4),
    ]


def test_sub_steps_are_told_with_the_schedule():
    assert points(axes={"substeps": [1, 4]})[1].axes["schedule"] == "one-shot, 4 sub-steps"


def test_the_identity_has_nothing_to_tune():
    assert {p.method: p.tunable for p in points()} == {"obs": True, "magnitude": False}


def test_departures_are_from_a_components_own_defaults():
    [found, _] = points(methods={"obs": {"estimator": {"name": "obs", "block_size": 16}}, "m": MAGNITUDE})
    assert departures(found, REGISTRY) == {"estimator.block_size": 16, "finetune.epochs": 0.0}


def test_departures_are_told_where_the_defaults_alone_could_not_run():
    """`obs-layerwise` without an allocation does not compare layers, as the pattern does."""
    layerwise = {"estimator": {"name": "obs-layerwise", "allocation": "fisher"}}
    [found, _] = points(methods={"layerwise": layerwise, "m": MAGNITUDE})
    assert departures(found, REGISTRY) == {"estimator.allocation": "fisher", "finetune.epochs": 0.0}


def test_an_estimators_defaults_do_not_change_the_protocol():
    found = {p.method: p.resolved for p in points(methods={"fishleg": {"estimator": "fishleg"}, "m": MAGNITUDE})}
    assert found["fishleg"].saliency.cls.name == "obs-rows"
    assert {run.settings.reconstruction.how for run in found.values()} == {"none"}
    assert {run.settings.batch_norm.statistics for run in found.values()} == {"kept"}


def test_departures_of_a_preset_are_from_the_preset():
    [found, _] = points(methods={"cap": {"preset": "cap", "estimator": {"damping": 0.5}}, "m": MAGNITUDE})
    assert departures(found, REGISTRY)["estimator.damping"] == 0.5
    assert "estimator.block_size" not in departures(found, REGISTRY)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": {"obs": {"estimator": "obss"}}}, r"^obs: no estimator 'obss'; did you mean 'obs'\?"),
        ({"axes": {"compensation": "joint"}}, r"axes\.compensation = 'joint'; a list of values"),
        ({"axes": {"compensaton": ["joint"]}}, r"a run has no setting 'compensaton'"),
        ({"axes": {"cuts": {"one": 1}}}, r"axes\.cuts\.one = 1; a mapping of a run's settings was needed"),
        ({"axes": {"pattern": [{"n": 2}]}}, r"\{'n': 2\}, has no name; give the axis as label: settings"),
        ({"axes": {"pattern": ["uniform", {"name": "uniform"}]}}, r"axes\.pattern has two values of one name"),
        ({"axes": {"cuts": {}}}, r"axes\.cuts has no values; give some, or leave it out"),
        ({"axes": {"compensation": {"strong": {}}}}, r"axes\.compensation gives labels of its own"),
        ({"axes": {"method": {"x": {}}}}, r"axes\.method gives labels of its own"),
        ({"tune": {"over": ["compensaton"]}}, r"tune\.over names 'compensaton', which is no axis; known: task, method"),
        ({"tune": {"sparsity": [1.7]}}, r"tune\.sparsity\.0 = 1\.7 is not valid"),
        (
            {"axes": {"task": {"a": {}}}},
            r"axes\.task gives labels of its own, but what a run's task is called",
        ),
        (
            {"methods": {"a": {"estimator": "obs"}, "m": {**MAGNITUDE, "task": {"name": "digits", "seed": 1}}}},
            r"the task 'digits' has two settings",
        ),
        ({"run": {**ONE_CUT, "seed": 3}}, r"'seed' is the comparison's own"),
        ({"seeds": [1, 1]}, r"seeds = \[1, 1\] names a seed twice"),
        ({"reference": "magnitud"}, r"reference = 'magnitud' is not a method of the file: obs, magnitude"),
        ({"tune": {"low": 2, "high": 1}}, r"tune\.low = 2\.0 must be below tune\.high = 1\.0"),
        ({"tune": {"seed": 0}}, r"tune\.seed = 0 is one of the comparison's seeds"),
        ({"methods": {"a": {"estimator": "obs"}, "b": {"estimator": "obs"}}}, r"'b' and 'a' are the same run"),
        ({"name": "a/b"}, r"name = 'a/b' is not valid"),
        ({"method": {}}, r"there is no setting 'method'; did you mean 'methods'\?"),
    ],
)
def test_what_cannot_be_run_is_refused(changes, sentence):
    with pytest.raises((SettingsError, PluginError), match=sentence):
        points(**changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"run": {**ONE_CUT, "sparsity": [0.9]}}, "1 sparsities are compared; at least five"),
        ({"seeds": [0]}, "1 seed(s): no interval can be given"),
        ({"run": {**ONE_CUT, "split": "tuning"}}, "not of the reporting half"),
        ({"methods": {"obs": {"estimator": "obs"}}}, "no magnitude baseline with reconstruction 'none'"),
        ({"axes": {"finetune": {"no": {}, "yes": {"finetune": {"epochs": 1}}}}}, "fine-tuned by different recipes"),
        ({"methods": {"obs": {"estimator": "obs"}, "m": {**MAGNITUDE, "exclude": ["*1*"]}}}, "different parameters"),
        (
            {"methods": {"a": {"estimator": "obs"}, "b": {"estimator": {"name": "diagonal", "examples": 64}}}},
            "see different numbers of examples (64, 1024)",
        ),
    ],
)
def test_departures_from_the_protocol_are_told(changes, sentence):
    assert sentence in told(**changes)


def test_a_file_that_keeps_to_the_protocol_is_told_nothing():
    assert told(tune={}) == ""
