import sys
import types
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch

from sparsekit import CurvatureEstimator, Preset, Settings, hookimpl
from sparsekit.errors import PluginError, SettingsError
from sparsekit.methods.contracts import inverse_of, scores_of
from sparsekit.methods.estimators import Identity
from sparsekit.registry import builtins
from sparsekit.registry.registry import PluginInfo, Registry


class FakeEntryPoint:
    dist = None
    value = "somewhere"

    def __init__(self, name, load):
        self.name, self._load = name, load

    def load(self):
        return self._load()


def module(**functions):
    made = types.ModuleType("plugin")
    for name, function in functions.items():
        setattr(made, name, hookimpl(function))
    return made


def broken():
    raise ImportError("no module named 'cupy'")


def test_builtins_come_through_the_hooks():
    registry = Registry(builtins, [])
    assert registry.names("estimator") == ["diagonal", "identity"]
    assert registry.names("saliency") == [
        "linear-model", "magnitude", "obd", "obs", "obs-rows", "quadratic-model", "random"
    ]  # fmt: skip


def test_a_broken_plugin_is_a_finding():
    registry = Registry(builtins, [FakeEntryPoint("bad", broken)])
    assert registry.plugins[-1].status == "ImportError: no module named 'cupy'"
    assert registry.get("estimator", "identity") is Identity


def test_a_broken_plugin_is_fatal_when_asked_for():
    registry = Registry(builtins, [FakeEntryPoint("bad", broken)])
    with pytest.raises(PluginError, match="the plugin 'bad' .* failed to load: ImportError"):
        registry.get("estimator", "bad")


def test_an_unknown_name_mentions_what_failed():
    registry = Registry(builtins, [FakeEntryPoint("bad", broken)])
    with pytest.raises(SettingsError, match="failed to load: bad"):
        registry.get("estimator", "other")


def test_a_misspelt_hook_is_loud():
    registry = Registry(builtins, [FakeEntryPoint("typo", lambda: module(sparsekit_estimator=lambda: []))])
    assert "sparsekit_estimator" in registry.plugins[-1].status


def test_what_is_no_estimator_is_refused():
    registry = Registry(builtins, [FakeEntryPoint("odd", lambda: module(sparsekit_estimators=lambda: [int]))])
    assert "must be a subclass of sparsekit.CurvatureEstimator" in registry.plugins[-1].status


def offering(*classes):
    return lambda: module(sparsekit_estimators=lambda: classes)


def named(given, **attributes):
    """An estimator of a plugin's own, that works but for `attributes`."""
    return type("Own", (Identity,), {"name": given, **attributes})


def test_two_of_one_name_are_an_error_that_names_both():
    first, second = (FakeEntryPoint(name, offering(named("own"))) for name in ("a", "b"))
    second.value = "elsewhere"
    with pytest.raises(PluginError, match="registered by somewhere and elsewhere"):
        Registry(builtins, [first, second]).get("estimator", "own")


def test_a_built_in_keeps_its_name_and_the_plugin_is_told():
    registry = Registry(builtins, [FakeEntryPoint("twin", offering(named("identity"), named("own")))])
    assert registry.get("estimator", "identity") is Identity
    assert "the estimator 'identity' is sparsekit's own" in registry.plugins[-1].status
    assert registry.plugins[-1].registers == {"estimator": ["own"]}


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), GeneratorExit(), RecursionError("deep")])
def test_whatever_ends_an_import_is_a_finding(error):
    def load():
        raise error

    registry = Registry(builtins, [FakeEntryPoint("bad", load)])
    assert registry.plugins[-1].status.startswith(type(error).__name__)
    assert registry.get("estimator", "identity") is Identity


def test_what_a_hook_raises_is_a_finding():
    registry = Registry(builtins, [FakeEntryPoint("bad", lambda: module(sparsekit_tasks=lambda: sys.exit(3)))])
    assert registry.plugins[-1].status == "SystemExit: 3"


class Mute(Exception):
    def __str__(self):
        raise KeyError("text")


@pytest.mark.parametrize(
    ("error", "status"),
    [(Mute(), "Mute: its message cannot be had, KeyError"), (OSError("a\n\x1b[31m\udcff"), "OSError: a  [31m ")],
)
def test_a_message_that_no_terminal_can_show_is_shown(error, status):
    assert PluginInfo("bad", "somewhere", "1", error=error).status == status


def test_a_preset_whose_settings_are_no_mapping_is_a_finding():
    odd = FakeEntryPoint("odd", lambda: module(sparsekit_presets=lambda: [Preset("odd", "a paper", None)]))
    assert "must be a mapping, not None" in Registry(builtins, [odd]).plugins[-1].status


def test_what_a_plugin_prints_is_no_result(capsys):
    def load():
        print("hello")
        return module(sparsekit_tasks=lambda: print("hello again") or [])

    Registry(builtins, [FakeEntryPoint("loud", load)])
    assert capsys.readouterr() == ("", "hello\nhello again\n")


def test_a_plugin_without_a_hook_is_a_finding():
    registry = Registry(builtins, [FakeEntryPoint("empty", module)])
    assert "implements no hook" in registry.plugins[-1].status


def test_two_entry_points_of_one_name_are_both_there():
    points = [FakeEntryPoint("same", offering(named(name))) for name in ("one", "two")]
    registry = Registry(builtins, points)
    assert {"one", "two"} <= set(registry.names("estimator"))
    assert [info.name for info in registry.plugins] == ["builtins", "same", "same"]


class Unfinished(CurvatureEstimator):
    name = "own"


WRONG = {
    "settings that are no model": (named("own", Settings=dict), "`Settings` of the estimator 'own' must be a pydantic"),
    "a model that lacks what all have": (named("own", Settings=Settings), "subclass of sparsekit.EstimatorSettings"),
    "abstract methods": (Unfinished, "does not implement inverse, load_state_dict, memory, state_dict, update"),
    "a constructor": (named("own", __init__=lambda self: None), r"must be made from \(space, settings\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_could_not_be_used_is_one_sentence_that_names_plugin_and_distribution(case):
    wrong, sentence = WRONG[case]
    registry = Registry(builtins, [FakeEntryPoint("mine", offering(wrong))])
    with pytest.raises(SettingsError, match=rf"mine \(somewhere unknown\): PluginError: .*{sentence}"):
        registry.get("estimator", "own")


def test_an_inverse_of_another_type_names_plugin_and_distribution():
    wrong = named("own", inverse=lambda self, damping=None: torch.eye(2))
    wrong.__module__ = "sparsekit_obs.estimator"
    with pytest.raises(
        PluginError, match="'own' .plugin 'obs' of sparsekit-obs .* returned a tensor .2, 2.; a sparsekit.InverseFisher"
    ):
        inverse_of(wrong(None, None))


def test_installed_plugins_are_found_by_entry_point():
    registry = Registry(builtins)
    assert {"fishleg", "obs"} <= set(registry.names("estimator"))


def test_a_real_entry_point_that_is_missing_is_a_finding():
    point = EntryPoint("ghost", "sparsekit_ghost", "sparsekit")
    assert Registry(builtins, [point]).plugins[-1].status.startswith("ModuleNotFoundError")


@pytest.mark.parametrize("scores", [None, torch.ones(2), torch.ones(1, 3)])
def test_scores_of_another_shape_name_plugin_and_distribution(scores):
    wrong = type("Odd", (), {"name": "odd", "score": lambda self, context: scores, "__module__": "sparsekit_obs"})
    with pytest.raises(PluginError, match=r"'odd' .plugin 'obs' of sparsekit-obs .* a tensor \(3,\), a score for each"):
        scores_of(wrong(), SimpleNamespace(weights=torch.ones(3)))


@pytest.mark.parametrize("name", ["Bad Name/../x", "", "-x", "a" * 51])
def test_names_that_are_no_option_and_no_folder_are_refused(name):
    registry = Registry(builtins, [FakeEntryPoint("p", offering(named(name)))])
    assert "letters, digits and" in registry.plugins[-1].status


def test_a_name_that_is_inherited_is_refused():
    child = type("Child", (named("own"),), {})
    registry = Registry(builtins, [FakeEntryPoint("p", offering(child))])
    assert "has the `name` 'own' of the class that it inherits from" in registry.plugins[-1].status


def test_a_plugin_that_registers_nothing_says_so():
    registry = Registry(builtins, [FakeEntryPoint("p", offering())])
    assert "its hooks return nothing" in registry.plugins[-1].status
