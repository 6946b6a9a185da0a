"""`sparsekit plugins new` and `check`, and which plugins are loaded."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest

from sparsekit import testing
from sparsekit.errors import PluginError
from sparsekit.registry import builtins, installed
from sparsekit.registry.registry import Registry

KINDS = ["estimator", "saliency", "schedule", "pattern", "task"]


@pytest.fixture
def made(cli, tmp_path, monkeypatch):
    """A function from a kind to the module of a new distribution."""

    def make(kind):
        code, out, err = cli("plugins", "new", f"my-{kind}", "--kind", kind, "--output", str(tmp_path), output=False)
        assert code == 0, err
        folder = tmp_path / f"sparsekit-my-{kind}"
        assert f"sparsekit plugins check my-{kind}" in " ".join(out.split())
        monkeypatch.syspath_prepend(str(folder / "src"))
        importlib.invalidate_caches()
        return importlib.import_module(f"sparsekit_my_{kind}"), folder

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_distribution_registers_and_passes_its_kit(made, kind):
    module, folder = made(kind)
    point = SimpleNamespace(name=f"my-{kind}", load=lambda: module, dist=None, value="m")
    registry = Registry(builtins, [point])
    assert registry.plugins[-1].status == "ok"
    component = registry.get(kind, f"my-{kind}")
    given = dict(component.conformance) if kind == "task" else {}
    if kind == "estimator":
        given = {"problems": ("mlp", "sequence")}
    checks = testing.task_checks(**given) if kind == "task" else getattr(testing, f"{kind}_checks")(component, **given)
    assert len(checks) >= 2
    for _, run in checks:
        run()
    assert {path.name for path in folder.iterdir()} == {"pyproject.toml", "README.md", "src", "tests"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Bad Name/../x"], "words of small letters and digits joined by -"),
        (["mine", "--kind", "estimater"], "no kind 'estimater'; did you mean 'estimator'"),
    ],
)
def test_what_cannot_be_made_is_refused(cli, tmp_path, arguments, message):
    code, _, err = cli("plugins", "new", *arguments, "--output", str(tmp_path), output=False)
    assert code == 2
    assert message in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(cli, tmp_path):
    (tmp_path / "sparsekit-mine").mkdir()
    code, _, err = cli("plugins", "new", "mine", "--output", str(tmp_path), output=False)
    assert code == 2
    assert "already" in err


def of(module, monkeypatch, name="mine"):
    point = SimpleNamespace(name=name, load=lambda: module, dist=None, value="m")
    registry = Registry(builtins, [point])
    monkeypatch.setattr(sys.modules["sparsekit.cli.plugins"], "load_registry", lambda: registry)
    return registry


def test_a_check_tells_each_check_and_counts(cli, made, monkeypatch):
    of(made("schedule")[0], monkeypatch)
    code, out, _ = cli("plugins", "check", "mine", output=False)
    assert code == 0
    assert "ok: schedule my-schedule, rises" in out
    assert "2 of 2 checks of 'mine'" in out


def test_a_check_that_fails_is_told_and_the_exit_code_is_one(cli, made, monkeypatch):
    module, _ = made("schedule")
    monkeypatch.setattr(module.MySchedule, "sparsities", lambda self, a, b, n: [b / 2])
    of(module, monkeypatch)
    code, out, _ = cli("plugins", "check", "mine", "--failures", output=False)
    assert code == 1
    assert "failed: schedule my-schedule, reaches: from 0.0 to 0.9 in 1 steps it ends at" in " ".join(out.split())


def test_a_plugin_that_does_not_load_cannot_be_checked(cli, made, monkeypatch):
    module, _ = made("schedule")
    monkeypatch.setattr(module, "SPARSEKIT_INTERFACE", 99)
    of(module, monkeypatch)
    code, _, err = cli("plugins", "check", "mine", output=False)
    assert code == 2
    assert "written for version 99 of sparsekit's interfaces" in " ".join(err.split())


@pytest.mark.parametrize(("declared", "what"), [(0, "a newer version of the plugin"), (99, "a newer sparsekit")])
def test_another_interface_version_is_a_finding(made, monkeypatch, declared, what):
    module, _ = made("pattern")
    monkeypatch.setattr(module, "SPARSEKIT_INTERFACE", declared)
    assert f"install {what}" in of(module, monkeypatch).plugins[-1].status


def test_a_distribution_that_requires_another_sparsekit_is_a_finding(made, monkeypatch):
    module, _ = made("pattern")
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["torch", "sparsekit>=2"])
    assert "requires sparsekit>=2, and sparsekit" in of(module, monkeypatch).plugins[-1].status


def test_only_the_plugins_named_are_loaded(monkeypatch):
    monkeypatch.setenv("SPARSEKIT_PLUGINS", "obs, mfac")
    assert [info.name for info in installed.load_registry().plugins] == ["builtins", "mfac", "obs"]
    monkeypatch.setenv("SPARSEKIT_PLUGINS", "")
    assert [info.name for info in installed.load_registry().plugins] == ["builtins"]


def test_a_plugin_named_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setenv("SPARSEKIT_PLUGINS", "obs,nothing")
    with pytest.raises(
        PluginError, match="names 'nothing', and no plugin of that name is installed; installed: fishleg"
    ):
        installed.load_registry()


def test_a_broken_plugin_is_an_error_at_once_where_it_is_strict(monkeypatch):
    def broken():
        raise ImportError("no module named 'cupy'")

    point = SimpleNamespace(name="bad", load=broken, dist=None, value="bad")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [point])
    assert installed.load_registry().plugins[-1].error is not None
    monkeypatch.setenv("SPARSEKIT_STRICT", "1")
    with pytest.raises(PluginError, match="the plugin 'bad' .* failed to load: ImportError"):
        installed.load_registry()


def test_no_plugins_leaves_the_built_ins(cli, monkeypatch):
    monkeypatch.setenv("SPARSEKIT_PLUGINS", "obs")  # and is restored after what the command sets
    code, out, _ = cli("--no-plugins", "plugins", "--json", output=False)
    assert code == 0
    assert [row["name"] for row in json.loads(out)] == ["builtins"]
