from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from sparsekit.errors import DataError
from sparsekit.registry.installed import load_registry
from sparsekit.runs.run import execute
from sparsekit.runs.settings import resolve
from sparsekit.tasks import TinyImageNet, tinyimagenet

CLASSES = ["n02", "n01", "n03"]  # as published, wnids.txt is not sorted
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path, level, side=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side), level, dtype=np.uint8)).save(path)  # grey, as some of the published ones


@pytest.fixture
def folder(tmp_path):
    """Twelve training and seven validation images; the level of grey tells which."""
    root = tmp_path / "tiny-imagenet-200"
    for k, name in enumerate(sorted(CLASSES)):
        for i in range(4):
            write(root / "train" / name / "images" / f"{name}_{i}.JPEG", 10 * (4 * k + i))
    lines = []
    for i in range(7):
        write(root / "val" / "images" / f"val_{i}.JPEG", 30 * i)
        lines.append(f"val_{i}.JPEG\t{sorted(CLASSES)[i % 3]}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(CLASSES))
    return root


def task(folder, **settings):
    return TinyImageNet(TinyImageNet.Settings(data_dir=None if folder is None else str(folder), **settings))


def read(task, split, **options):
    """Levels of grey, and labels."""
    inputs, labels = zip(*task.batches(split, batch_size=3, **options), strict=True)
    pixels = (torch.cat(inputs) * STD + MEAN).mul(255).round()
    assert pixels.shape[1:] == (3, 64, 64)
    return pixels[:, 0, 32, 32].int().tolist(), torch.cat(labels).tolist()


@pytest.mark.parametrize(
    "split, levels, labels",
    [
        ("train", list(range(0, 120, 10)), [0] * 4 + [1] * 4 + [2] * 4),
        ("tuning", [0, 60, 120, 180], [0, 2, 1, 0]),
        ("reporting", [30, 90, 150], [1, 0, 2]),
    ],
)
def test_splits_hold_their_images_in_order(folder, split, levels, labels):
    found, found_labels = read(task(folder), split)
    assert found == pytest.approx(levels, abs=1)  # JPEG
    assert found_labels == labels
    assert task(folder).size(split) == len(levels)


def test_limited_examples_are_the_generator_s(folder):
    first, again, other = (
        read(task(folder), "train", limit=5, generator=torch.Generator().manual_seed(s))[0] for s in (0, 0, 1)
    )
    assert first == again != other


def test_decoded_images_are_cached_for_the_next_object(folder, monkeypatch):
    before = read(task(folder), "tuning")
    monkeypatch.setattr(tinyimagenet, "_decode", lambda *_: pytest.fail("images were decoded again"))
    assert read(task(folder), "tuning") == before


def test_training_images_are_not_decoded_for_the_test_s(folder, own_cache):
    read(task(folder), "reporting")
    assert [path.name.split("-")[1] for path in own_cache.iterdir()] == ["val"]


@pytest.mark.parametrize("kept", [0, 3, 200, 5000])
def test_damaged_cache_is_decoded_again(folder, own_cache, kept):
    before = read(task(folder), "tuning")
    (cached,) = own_cache.iterdir()
    cached.write_bytes(cached.read_bytes()[:kept])
    assert read(task(folder), "tuning") == before


def test_changed_files_are_decoded_again(folder):
    read(task(folder), "tuning")
    write(folder / "val" / "images" / "val_2.JPEG", 200)
    assert read(task(folder), "tuning")[0][1] == pytest.approx(200, abs=1)


def test_a_decoded_image_cannot_be_changed_for_others(folder):
    one = task(folder)
    before = read(one, "tuning")
    one._images("val").zero_()
    assert read(task(folder), "tuning") == before


def test_fingerprint_is_of_files_and_labels(folder, tmp_path):
    before = task(folder).fingerprint()
    assert task(folder).fingerprint() == before
    moved = folder.rename(tmp_path / "elsewhere")
    assert task(moved).fingerprint() == before
    annotations = moved / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text().replace("val_1.JPEG\tn02", "val_1.JPEG\tn01"))
    relabelled = task(moved).fingerprint()
    (moved / "train" / "n01" / "images" / "n01_0.JPEG").unlink()
    assert len({before, relabelled, task(moved).fingerprint()}) == 3


def test_network_has_as_many_classes_as_the_folder(folder):
    assert task(folder).network().fc.out_features == 3


def test_trained_network_is_cached(folder, monkeypatch):
    monkeypatch.setattr(tinyimagenet, "train", lambda model, *_: model.fc.bias.data.fill_(7))
    task(folder).model()
    monkeypatch.setattr(tinyimagenet, "train", lambda *_: pytest.fail("trained again"))
    assert set(task(folder).model().fc.bias.tolist()) == {7}


def test_checkpoint_is_loaded_and_nothing_trained(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tinyimagenet, "train", lambda *_: pytest.fail("trained"))
    given = task(folder, seed=3).network().state_dict()
    torch.save(given, tmp_path / "given.pt")
    assert_close(dict(task(folder, checkpoint=str(tmp_path / "given.pt")).model().state_dict()), dict(given))


def test_missing_checkpoint_is_refused_at_once(folder, tmp_path):
    with pytest.raises(DataError, match="no checkpoint file .*; leave it out to train one"):
        task(folder, checkpoint=str(tmp_path / "absent.pt"))


def test_missing_data_directory_is_asked_for():
    with pytest.raises(DataError, match="the task 'tinyimagenet' needs --data-dir"):
        task(None)


def test_absent_data_directory_is_refused_at_once(tmp_path):
    with pytest.raises(DataError, match="no data directory .*absent"):
        task(tmp_path / "absent")


def test_missing_file_of_the_layout_is_named_at_once(folder):
    (folder / "val" / "val_annotations.txt").unlink()
    with pytest.raises(
        DataError, match=r"holds no val/val_annotations\.txt; tiny-imagenet-200 as published was needed"
    ):
        task(folder)


def test_class_without_images_is_named(folder):
    for path in (folder / "train" / "n03" / "images").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"holds no train/n03/images/\*\.JPEG, a class that wnids\.txt names"):
        task(folder).size("train")


@pytest.mark.parametrize("line", ["val_0.JPEG\tn99\t0", "val_99.JPEG\tn01\t0", "val_0.JPEG", ""])
def test_annotation_that_cannot_be_is_named(folder, line):
    (folder / "val" / "val_annotations.txt").write_text(f"val_1.JPEG\tn01\t0\n{line}\n")
    with pytest.raises(DataError, match=f"has the line '{line}'; an image of val/images and a class of wnids.txt"):
        task(folder).size("tuning")


def test_empty_lists_are_refused(folder):
    (folder / "val" / "val_annotations.txt").write_text("")
    with pytest.raises(DataError, match="names no images"):
        task(folder).size("tuning")
    (folder / "wnids.txt").write_text("")
    with pytest.raises(DataError, match="names no classes"):
        task(folder).network()


def test_images_of_another_size_are_named(folder):
    write(folder / "val" / "images" / "val_2.JPEG", 0, side=32)
    with pytest.raises(DataError, match=r"val_2\.JPEG' is of 32 × 32 pixels, 64 × 64 was needed"):
        task(folder).batches("tuning", batch_size=2)


@pytest.mark.slow
def test_it_is_trained_and_pruned(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tinyimagenet, "RESIDUAL", replace(tinyimagenet.RESIDUAL, batch_size=6))
    settings = {
        "task": {"name": "tinyimagenet", "data_dir": str(folder), "epochs": 1},
        "estimator": {"name": "diagonal", "examples": 4, "batch_size": 4},
        "schedule": "one-shot",
        "sparsity": [0.9],
        "output": str(tmp_path / "runs"),
        "tracking": {"enabled": False},
    }
    registry = load_registry()
    record = execute(resolve(settings, registry), registry).record
    assert record.levels[0].achieved == pytest.approx(0.9, abs=1e-4)
