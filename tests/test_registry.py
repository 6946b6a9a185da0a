import types
from importlib.metadata import EntryPoint

import pytest

from sparsekit import builtins, hookimpl
from sparsekit.errors import PluginError, SettingsError
from sparsekit.estimators import Identity
from sparsekit.registry import Registry


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
    assert registry.names("saliency") == ["magnitude", "obs", "random"]


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


def test_two_of_one_name_are_an_error_that_names_both():
    twice = FakeEntryPoint("twin", lambda: module(sparsekit_estimators=lambda: [Identity]))
    with pytest.raises(PluginError, match="registered by sparsekit and somewhere"):
        Registry(builtins, [twice]).get("estimator", "identity")


def test_installed_plugins_are_found_by_entry_point():
    registry = Registry(builtins)
    assert {"fishleg", "obs"} <= set(registry.names("estimator"))


def test_a_real_entry_point_that_is_missing_is_a_finding():
    point = EntryPoint("ghost", "sparsekit_ghost", "sparsekit")
    assert Registry(builtins, [point]).plugins[-1].status.startswith("ModuleNotFoundError")
