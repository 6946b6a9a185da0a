"""The ready-made comparison files are valid, keep to the protocol, and lead from a tiny data set to finished runs."""

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sparsekit.compare.engine import Engine
from sparsekit.compare.spec import ComparisonSettings, expand, warnings
from sparsekit.compare.study import StudySettings, comparison
from sparsekit.models import resnet
from sparsekit.registry.installed import load_registry
from sparsekit.runs.settings import merge, read_config
from sparsekit.runs.validation import validated

FILES = sorted((Path(__file__).parents[2] / "comparisons").glob("*.yaml"))
REGISTRY = load_registry()
DRAW = np.random.default_rng(0)


def image(path, side):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(DRAW.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)


def mnist(folder):
    for name, count in (("train", 64), ("t10k", 20)):
        pixels = DRAW.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))


def cifar10(folder):
    for name, count in (("train-00000-of-00001", 40), ("test-00000-of-00001", 20)):
        cells = []
        for _ in range(count):
            out = io.BytesIO()
            Image.fromarray(DRAW.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(out, "PNG")
            cells.append({"bytes": out.getvalue(), "path": "image"})
        pq.write_table(pa.table({"img": cells, "label": [i % 10 for i in range(count)]}), folder / f"{name}.parquet")


def tinyimagenet(folder):
    lines = []
    for k in range(3):
        for i in range(8):
            image(folder / "train" / f"n{k}" / "images" / f"n{k}_{i}.JPEG", 64)
        for i in range(4):
            image(folder / "val" / "images" / f"val_{k}{i}.JPEG", 64)
            lines.append(f"val_{k}{i}.JPEG\tn{k}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("n0\nn1\nn2")


def imagenet(folder):
    for part, count in (("train", 8), ("val", 4)):
        for k in range(3):
            for i in range(count):
                image(folder / part / f"n{k}" / f"{i}.JPEG", 64)


MAKERS = {"mnist": mnist, "autoencoder": mnist, "cifar10": cifar10, "tinyimagenet": tinyimagenet, "imagenet": imagenet}


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def raw(request, tmp_path, monkeypatch):
    """A file, with a tiny data set and dense weights for its task."""
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache"))
    raw = read_config(request.param)
    task = merge({"task": raw["run"]["task"]})["task"]
    folder = tmp_path / "data"
    folder.mkdir()
    if task["name"] in MAKERS:
        MAKERS[task["name"]](folder)
        task["data_dir"] = str(folder)
    if raw["name"] == "cifar10-resnet20-oneshot":
        task["checkpoint"] = str(tmp_path / "resnet20.pt")
        torch.save(resnet(20).state_dict(), task["checkpoint"])
    if raw["name"] == "imagenet-resnet50-oneshot":
        task |= {"checkpoint": str(tmp_path / "resnet50.pt"), "workers": 0}
        made = REGISTRY.get("task", "imagenet")
        dense = made(made.Settings(data_dir=str(folder), download=True, architecture=task["architecture"]))
        torch.save(dense.network().state_dict(), task["checkpoint"])
    return merge(raw, {"run": {"task": task}})


def test_files_are_found():
    assert {path.stem for path in FILES} >= {"digits", "mnist", "autoencoder", "cifar10-resnet20-oneshot"}


def test_a_file_is_named_after_its_comparison(raw, request):
    assert f"[{raw['name']}]" in request.node.name


def test_a_file_keeps_to_the_protocol(raw):
    given = validated(ComparisonSettings, raw, "")
    told = warnings(given, expand(given, REGISTRY))
    allowed = ["nothing is tuned", "fine-tuned by different recipes"]  # said in the report
    if raw["name"] == "fishleg-noise":  # asks what few examples cost
        allowed.append("different numbers of examples")
    if raw["name"] in ("cifar10-resnet20-finetuned", "cifar10-resnet20-gradual"):  # epochs for each level: hours
        allowed.append("sparsities are compared")
    assert [line for line in told if not any(part in line for part in allowed)] == []


@pytest.mark.slow
def test_a_file_leads_to_finished_runs(raw, tmp_path, inline):
    few = {"examples": 8, "batch_size": 4}
    run = {"steps": 1, "sparsity": [0.5], "reconstruction": few, "estimator": few}
    if "resnet18" in raw["name"]:
        run["task"] = {"epochs": 1}
    if "resnet18" in raw["name"] or "resnet50" in raw["name"]:
        run["include"] = ["layer1.*"]  # a large layer takes minutes here
    raw = merge(raw, {"run": run, "seeds": [0]})
    raw["methods"] = {name: raw["methods"][name] for name in ("fishleg", "obs", "magnitude")}
    raw.pop("tune", None)
    found = Engine(validated(ComparisonSettings, raw, ""), tmp_path / "out", REGISTRY).run(inline)
    assert {d: f.cause for d, f in found.failures.items()} == {}
    assert all(found.finished(run) for run in found.plan.runs)


STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_files_are_valid(path, tmp_path):
    raw = read_config(path)
    {"mnist": mnist, "cifar10": cifar10}[raw["run"]["task"]["name"]](tmp_path)
    given = validated(StudySettings, merge(raw, {"run": {"task": {"data_dir": str(tmp_path)}}}), "")
    assert given.name == path.stem
    assert ("reduced" in path.stem) == ("REDUCED" in path.read_text())
    assert len(expand(comparison(given, REGISTRY), REGISTRY)) >= 4
