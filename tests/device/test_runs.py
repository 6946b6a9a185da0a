"""What runs on the CPU runs on an accelerator, with the same draws and so the same result."""

import json

import pytest
from runs import RUNS, command

from sparsekit.compare.engine import Engine
from sparsekit.compare.spec import ComparisonSettings
from sparsekit.pruning.pruner import Pruner
from sparsekit.registry.installed import load_registry
from sparsekit.runs.validation import validated

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_loss_of_the_cpu(name, accelerator, small_run, tmp_path):
    there, here = (small_run(device, tmp_path / str(device), name) for device in (accelerator, "cpu"))
    for one, other in zip(there["levels"], here["levels"], strict=True):
        assert one["achieved"] == other["achieved"]
        assert one["pruned"]["loss"] == pytest.approx(other["pruned"]["loss"], rel=0.05, abs=0.01)


def test_the_dense_network_is_trained_there(accelerator, small_run, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "empty"))
    assert small_run(accelerator, tmp_path, "diagonal")["levels"]


def test_the_record_names_the_device_and_its_peak(accelerator, small_run, tmp_path):
    small_run(accelerator, tmp_path, "diagonal")
    [path] = tmp_path.glob("*/record.json")
    record = json.loads(path.read_text())
    assert record["machine"]["device"].startswith(accelerator.type)
    assert 0 < record["peak_memory_bytes"] < 2**30


def test_a_finished_run_is_the_same_one_on_another_device(accelerator, small_run, tmp_path):
    small_run(accelerator, tmp_path, "obs")
    small_run("cpu", tmp_path, "obs")
    assert len(list(tmp_path.glob("*/record.json"))) == 1


def test_a_comparison_and_its_report(accelerator, tmp_path, inline):
    given = {
        "name": "mine",
        "run": {
            "task": "digits",
            "device": str(accelerator),
            "schedule": "one-shot",
            "sparsity": [0.5, 0.8],
            "finetune": {"epochs": 0},
            "estimator": {"examples": 64},
        },
        "methods": {"obs": {"estimator": "obs"}, "diagonal": {"estimator": "diagonal"}},
        "seeds": [0],
        "reference": "diagonal",
    }
    engine = Engine(validated(ComparisonSettings, given, ""), tmp_path / "mine", load_registry())
    assert all(engine.run(inline).finished(run) for run in engine.run(inline).plan.runs)
    command("report", tmp_path / "mine")
    assert "obs" in (tmp_path / "mine" / "report" / "report.md").read_text()


class Stop(Exception):
    """Stands for an interruption."""


@pytest.mark.parametrize("to_the_cpu", [True, False], ids=["device to CPU", "CPU to device"])
def test_a_run_goes_on_on_another_device(accelerator, small_run, tmp_path, monkeypatch, to_the_cpu):
    devices = (accelerator, "cpu") if to_the_cpu else ("cpu", accelerator)
    whole, step = Pruner._step, 0

    def once(self, *arguments, **named):
        nonlocal step
        step += 1
        if step == 2:
            raise Stop
        return (yield from whole(self, *arguments, **named))

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Pruner, "_step", once)
        small_run(devices[0], tmp_path, "obs")
    summary = small_run(devices[1], tmp_path, "obs", "--resume")
    other = small_run("cpu", tmp_path / "other", "obs")
    assert summary["levels"][-1]["pruned"]["loss"] == pytest.approx(
        other["levels"][-1]["pruned"]["loss"], rel=0.05, abs=0.01
    )
