"""The examples run, and the third parties' distributions among them load, pass their kits and are used by name."""

import importlib
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparsekit.registry import builtins
from sparsekit.registry.registry import KINDS, Registry

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
DISTRIBUTIONS = sorted(EXAMPLES.glob("sparsekit-*"))


@pytest.mark.filterwarnings("ignore::sparsekit.errors.DegradedWarning")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs(script, capsys):
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out


@pytest.fixture
def registry():
    """The built-ins and the examples' distributions, as if installed."""
    points = []
    for folder in DISTRIBUTIONS:
        name = folder.name.replace("-", "_")
        points.append(
            SimpleNamespace(name=folder.name, load=lambda n=name: importlib.import_module(n), dist=None, value=name)
        )
    return Registry(builtins, points)


def test_the_distributions_register_one_of_every_kind(registry):
    ours = registry.plugins[-len(DISTRIBUTIONS) :]
    assert [info.status for info in ours] == ["ok"] * len(ours)
    assert {kind for info in ours for kind in info.registers} == set(KINDS)
