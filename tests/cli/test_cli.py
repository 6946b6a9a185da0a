import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sparsekit.models import DigitsNet
from sparsekit.registry.registry import PluginInfo

FAST = [
    "--set",
    "estimator.examples=128",
    "--set",
    "estimator.auxiliary_steps=2",
    "--set",
    "finetune.epochs=0.2",
]


def test_the_main_job_end_to_end(cli, tmp_path):
    code, out, _ = cli("run", "--estimator", "fishleg", "--json", "--sparsity", "0.8", *FAST)
    summary = json.loads(out)
    assert code == 0
    assert set(summary) == {"run", "record", "dense", "levels", "seconds", "peak_memory_bytes", "degraded"}
    level = summary["levels"][0]
    assert level["achieved"] == pytest.approx(0.8, abs=1e-4)
    assert 0 <= level["pruned"]["accuracy"] <= 1
    assert level["finetuned"] is not None
    assert summary["degraded"] == []
    assert (tmp_path / "runs" / "mlflow.db").is_file()


def test_the_written_weights_are_plain_and_exactly_as_sparse_as_asked(cli, tmp_path):
    _, out, _ = cli(
        "run",
        "--estimator",
        "obs",
        "--no-tracking",
        "--json",
        "--sparsity",
        "0.9",
        "--set",
        "finetune.epochs=0.2",
    )
    summary = json.loads(out)
    folder = tmp_path / "runs" / summary["run"]
    weights, kept = load_file(folder / "weights.safetensors"), load_file(folder / "mask.safetensors")
    total = sum(mask.numel() for mask in kept.values())
    assert sum(int((~mask).sum()) for mask in kept.values()) == round(0.9 * total)
    assert all(torch.all(weights[name][~mask] == 0) for name, mask in kept.items())


def test_several_levels_of_a_one_shot_share_the_curvature(cli, tmp_path):
    args = ["--schedule", "one-shot", "--sparsity", "0.5", "--sparsity", "0.9", "--set", "finetune.epochs=0"]
    _, out, _ = cli("run", "--estimator", "obs", "--no-tracking", "--json", *args)
    record = json.loads(Path(json.loads(out)["record"]).read_text())
    assert record["path"] == "independent"
    assert [step["refreshed"] for step in record["steps"]] == [True, False]


def test_the_same_command_again_does_nothing(cli):
    args = ("run", "--estimator", "identity", "--no-tracking", "--set", "finetune.epochs=0")
    cli(*args)
    code, out, _ = cli(*args)
    assert code == 0
    assert "finished before" in out


def test_a_run_repeats_from_its_own_yaml(cli, tmp_path):
    _, out, _ = cli("run", "--estimator", "diagonal", "--no-tracking", "--json", "--set", "finetune.epochs=0")
    first = json.loads(out)
    _, out, _ = cli("run", "--config", str(tmp_path / "runs" / first["run"] / "run.yaml"), "--no-tracking", "--json")
    assert json.loads(out)["run"] == first["run"]


FEW = ("--preset", "woodfisher-resnet20", "--set", "estimator.examples=64", "--set", "finetune.epochs=0")


def test_a_preset_leaves_its_name(cli):
    _, out, _ = cli("run", *FEW, "--no-tracking")
    assert "woodfisher-resnet20: woodfisher on digits" in " ".join(out.split())
    _, out, _ = cli("run", *FEW, "--no-tracking", "--json")
    record = json.loads(Path(json.loads(out)["record"]).read_text())
    assert record["settings"]["preset"] == "woodfisher-resnet20"


def test_a_run_of_a_preset_repeats_from_its_own_yaml(cli, tmp_path):
    _, out, _ = cli("run", *FEW, "--no-tracking", "--json")
    first = json.loads(out)
    _, out, _ = cli("run", "--config", str(tmp_path / "runs" / first["run"] / "run.yaml"), "--no-tracking")
    assert "finished before" in out


def test_a_dry_run_writes_nothing(cli, tmp_path):
    code, out, _ = cli("run", "--dry-run")
    assert code == 0
    assert "linear1.bias" in out and "skipped" in out and "MiB" in out
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_that_it_does_not_know_what_is_unused(cli):
    _, out, _ = cli("run", "--dry-run")
    assert "What no gradient reaches is found in the run" in " ".join(out.split())


def test_a_dry_run_as_json_shows_resolved_settings(cli):
    _, out, _ = cli("run", "--dry-run", "--json", "--set", "estimator.damping=1e-3")
    assert json.loads(out)["settings"]["estimator"]["damping"] == 1e-3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--estimator", "fishlog"], "did you mean 'fishleg'"),
        (["--task", "digit"], "did you mean 'digits'"),
        (["--set", "estimator.dampin=1"], "did you mean 'damping'"),
        (["--sparsity", "1.5"], "sparsity.0 = 1.5 is not valid"),
        (["--sparsity", "1"], "sparsity.0 = 1.0 is not valid"),
        (["--sparsity", "nan"], "sparsity.0 = nan is not valid: input should be a finite number"),
        (["--set", "sparsity=1.2"], "sparsity.0 = 1.2 is not valid"),
        (["--set", "finetune.epochs=inf"], "finetune.epochs = inf is not valid"),
        (["--pattern", "n:m", "--set", "pattern.m=1000"], "has no group of 1000"),
        (["--set", "estimator.damping=0"], "estimator.damping = 0 is not valid"),
        (["--set", "estimator.examples=5000"], "needs 5000 calibration examples"),
        (["--config", "nowhere.yaml"], "'nowhere.yaml' cannot be read"),
        (["--task", "cifar10"], "give its weights by --checkpoint"),
        (["--checkpoint", "nowhere.th"], "no checkpoint file 'nowhere.th'"),
        (["--pattern", "n:m", "--sparsity", "0.9"], "2:4 removes at most 0.5"),
        (["--set", "include=[nothing.*]"], "matches no parameter"),
        (["--set", "exclude=['*']"], "no prunable parameter"),
        (["--tracking-uri", "http://a b"], "an address without spaces was needed"),
        (["--tracking-uri", "htp://localhost"], "MLflow knows no addresses that begin with 'htp://'"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(cli, tmp_path, args, message):
    code, out, err = cli("run", *args)
    assert code == 2
    assert out == ""
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.glob("runs/digits*"))


def test_a_loss_that_is_not_finite_leaves_no_record(cli, tmp_path):
    weights = {name: tensor * 1e30 for name, tensor in DigitsNet().state_dict().items()}
    torch.save(weights, tmp_path / "huge.pt")
    code, out, err = cli("run", "--checkpoint", str(tmp_path / "huge.pt"))
    assert code == 2
    assert out == ""
    assert "outputs contain NaN" in err and err.count("\n") == 1
    assert not list(tmp_path.glob("runs/digits*")) and not (tmp_path / "runs" / "mlflow.db").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_where_there_is_none(cli):
    code, _, err = cli("run", "--device", "cuda")
    assert code == 2
    assert "torch finds no CUDA device" in err


def test_a_missing_data_directory(cli, tmp_path):
    checkpoint = tmp_path / "dense.pt"
    torch.save({}, checkpoint)
    code, _, err = cli("run", "--task", "cifar10", "--checkpoint", str(checkpoint), "--data-dir", "nowhere")
    assert code == 2
    assert "no data directory 'nowhere'" in err


def test_a_config_file_with_a_typo(cli, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"estimater": "obs"}))
    code, _, err = cli("run", "--config", str(path))
    assert code == 2
    assert "no setting 'estimater'; did you mean 'estimator'" in err


def test_plugins_as_json(cli):
    _, out, _ = cli("plugins", "--json", output=False)
    listed = {row["name"]: row for row in json.loads(out)}
    assert listed["fishleg"]["status"] == "ok"
    assert listed["fishleg"]["registers"] == {"estimator": ["fishleg"]}


def test_plugins_as_a_table(cli):
    code, out, _ = cli("plugins", output=False)
    assert code == 0
    assert "fishleg" in out


def test_settings_of_an_estimator(cli):
    _, out, _ = cli("plugins", "--settings", "obs", output=False)
    assert "estimator.block_size" in out


def test_python_dash_m(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sparsekit", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("sparsekit", run_name="__main__")
    assert (stop.value.code or 0, capsys.readouterr().out.split()[0]) == (0, "sparsekit")


NAMES = ["a[/b]", "[red]", "[/]", ":smile:"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_printed_as_it_is_named(cli, tmp_path, name):
    code, out, err = cli("run", "--dry-run", "--output", str(tmp_path / name), output=False)
    assert (code, err) == (0, "")
    assert f"/{name}" in out


def test_a_record_is_found_where_a_folder_looks_like_markup(cli, tmp_path):
    args = (
        "--estimator",
        "identity",
        "--no-tracking",
        "--set",
        "finetune.epochs=0",
        "--output",
        str(tmp_path / "a[/b]"),
    )
    code, out, _ = cli("run", *args, output=False)
    assert code == 0
    assert f"Record: {tmp_path}/a[/b]/" in out


def test_the_table_of_plugins_shows_a_message_as_it_stands(cli, monkeypatch):
    found = PluginInfo("[/b]", "[/i]", "1", {"task": ["[/t]"]}, RuntimeError("[/red]"))
    registry = SimpleNamespace(plugins=[found])
    monkeypatch.setattr(sys.modules["sparsekit.cli.plugins"], "load_registry", lambda: registry)
    code, out, _ = cli("plugins", output=False)
    assert code == 0
    assert all(text in out for text in ("[/b]", "[/i]", "task: [/t]", "RuntimeError: [/red]"))
