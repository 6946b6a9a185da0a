import pytest

from sparsekit.errors import SettingsError
from sparsekit.registry.installed import load_registry
from sparsekit.runs.settings import merge, parse_assignment, read_config, resolve


@pytest.fixture(scope="module")
def registry():
    return load_registry()


def test_the_defaults_resolve(registry):
    run = resolve({}, registry)
    assert run.estimator.cls.name == "fishleg"
    assert run.sparsity == run.task.cls.sparsity


def test_settings_without_a_name_are_the_default_components(registry):
    assert resolve({"estimator": {"damping": 0.5}}, registry).estimator.settings.damping == 0.5


def test_resolved_settings_resolve_to_themselves(registry):
    once = resolve({"estimator": {"name": "obs", "damping": 1e-3}, "sparsity": [0.9, 0.5]}, registry)
    assert resolve(once.as_dict(), registry).as_dict() == once.as_dict()


def test_a_preset_may_be_given_with_its_own_estimator(registry):
    run = resolve({"preset": "obert", "estimator": {"name": "obs", "examples": 32}}, registry)
    assert (run.estimator.settings.examples, run.estimator.settings.average) == (32, 16)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"estimator": "fishlog"}, "no estimator 'fishlog'; did you mean 'fishleg'"),
        ({"task": "digit"}, "no task 'digit'; did you mean 'digits'"),
        (
            {"estimator": {"name": "obs", "dampng": 1}},
            "no setting 'estimator.dampng'; did you mean 'damping'",
        ),
        ({"estimator": {"name": "obs", "damping": 0}}, "estimator.damping = 0 is not valid"),
        ({"estimator": {"name": "fishleg", "damping": -1}}, "estimator.damping = -1 is not valid"),
        ({"estimator": {"name": "obs", "damping": "small"}}, "estimator.damping = 'small' is not valid"),
        ({"sparsity": [1.0]}, r"sparsity.0 = 1.0 is not valid"),
        ({"sparsity": [-0.1]}, r"sparsity.0 = -0.1 is not valid"),
        ({"sparsity": 1.5}, r"sparsity.0 = 1.5 is not valid"),
        ({"sparsity": "most"}, r"sparsity.0 = 'most' is not valid"),
        ({"sparsity": float("nan")}, r"sparsity.0 = nan is not valid: input should be a finite number"),
        ({"sparsity": [float("nan")]}, r"sparsity.0 = nan is not valid: input should be a finite number"),
        ({"finetune": {"epochs": float("inf")}}, "finetune.epochs = inf is not valid: input should be a finite number"),
        ({"pattern": {"name": "n:m", "n": 4}}, "pattern = {'n': 4} is not valid: n:m keeps n of m weights"),
        ({"finetune": {"epoch": 1}}, "no setting 'finetune.epoch'; did you mean 'epochs'"),
        ({"tracking": {"url": "x"}}, "no setting 'tracking.url'; did you mean 'uri'"),
        ({"estimatr": "obs"}, "no setting 'estimatr'; did you mean 'estimator'"),
        ({"estimator": {"name": 3}}, "estimator needs a name"),
        ({"compensation": "some"}, "compensation.how = 'some' is not valid"),
    ],
)
def test_a_bad_setting_is_one_sentence(registry, raw, message):
    with pytest.raises(SettingsError, match=message):
        resolve(raw, registry)


@pytest.mark.parametrize("raw", [{"sparsity": 0.9}, {"sparsity": 0}, parse_assignment("sparsity=0.9")])
def test_a_single_sparsity_need_not_be_a_list(registry, raw):
    assert resolve(raw, registry).sparsity == (raw["sparsity"],)


def test_a_single_sparsity_takes_the_place_of_a_list():
    assert merge({"sparsity": [0.5, 0.9]}, {"sparsity": 0.8}) == {"sparsity": 0.8}


def test_an_option_wins_over_the_file_and_keeps_its_other_settings():
    file = {"estimator": {"name": "obs", "damping": 1e-3, "block_size": 10}}
    assert merge(file, {"estimator": {"damping": 1e-2}})["estimator"] == {
        "name": "obs",
        "damping": 1e-2,
        "block_size": 10,
    }


def test_another_component_by_name_does_not_inherit_settings():
    file = {"estimator": {"name": "obs", "block_size": 10}}
    assert merge(file, {"estimator": "diagonal"})["estimator"] == {"name": "diagonal"}


def test_a_component_without_a_name_keeps_its_settings_when_it_gets_one():
    assert merge({"estimator": {"examples": 64}}, {"estimator": "obs"})["estimator"] == {"examples": 64, "name": "obs"}


@pytest.mark.parametrize(
    ("text", "value"), [("a.b=1e-3", 1e-3), ("a.b=true", True), ("a.b=[1, 2]", [1, 2]), ("a.b=x", "x")]
)
def test_assignments_are_yaml(text, value):
    assert parse_assignment(text) == {"a": {"b": value}}


@pytest.mark.parametrize("text", ["a", "=1", "a..b=1"])
def test_an_assignment_without_key_or_value_is_refused(text):
    with pytest.raises(SettingsError, match="--set needs KEY=VALUE"):
        parse_assignment(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match="no.yaml' cannot be read: No such file"):
        read_config(tmp_path / "no.yaml")


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- 1", "must hold a mapping")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        read_config(path)


def test_reconstruction_with_settings_and_no_how_is_refused():
    with pytest.raises(SettingsError, match="settings without `how` do nothing; set how=layerwise or fisher"):
        resolve({"estimator": "obs", "reconstruction": {"examples": 64}}, load_registry())


def test_an_estimators_defaults_are_those_of_its_runs(registry):
    run = resolve({"estimator": "fishleg"}, registry)
    assert run.saliency.cls.name == "obs-rows"
    assert (run.settings.reconstruction.how, run.settings.batch_norm.statistics) == ("fisher", "anew")
    assert run.chosen == {"saliency", "compensation", "reconstruction", "batch_norm"}


def test_what_is_given_overrides_an_estimators_defaults(registry):
    run = resolve({"estimator": "fishleg", "saliency": "magnitude", "reconstruction": {"examples": 64}}, registry)
    assert run.saliency.cls.name == "magnitude"
    assert (run.settings.reconstruction.how, run.settings.reconstruction.examples) == ("fisher", 64)
    assert run.chosen == {"compensation", "batch_norm"}


def test_defaults_are_written_out(registry):
    once = resolve({"estimator": "fishleg"}, registry)
    again = resolve(once.as_dict(), registry)
    assert again.as_dict() == once.as_dict() and not again.chosen


def test_another_estimator_has_its_own_defaults(registry):
    run = resolve({"estimator": "obs"}, registry)
    assert run.saliency.cls.name == "obs"
    assert (run.settings.reconstruction.how, run.settings.batch_norm.statistics) == ("none", "kept")


def test_updates_while_fine_tuning_without_any_are_refused():
    with pytest.raises(SettingsError, match="refine_every = 4 .*set finetune.epochs"):
        resolve({"finetune": {"refine_every": 4, "epochs": 0}}, load_registry())


def test_a_section_that_is_no_mapping_is_told_what_it_can_be():
    with pytest.raises(SettingsError, match="reconstruction = True is not valid: a mapping .*one word for its 'how'"):
        resolve({"reconstruction": True}, load_registry())


def test_what_is_known_is_said_once_for_several_unknown_settings(registry):
    with pytest.raises(SettingsError) as refused:
        resolve({"first": 1, "other": 2}, registry)
    assert str(refused.value).count("Known: ") == 1
    assert str(refused.value).startswith("there is no setting 'first'; there is no setting 'other'. Known: ")


@pytest.mark.parametrize(("given", "epochs", "ridge"), [({}, 0, 0.03), ({}, 1, 0.3), ({"ridge": 0.1}, 1, 0.1)])
def test_the_ridge_of_a_fit_depends_on_the_training_after_it(registry, given, epochs, ridge):
    raw = {"reconstruction": {"how": "fisher", **given}, "finetune": {"epochs": epochs}}
    made = resolve(raw, registry)
    assert made.as_dict()["reconstruction"]["ridge"] == ridge
