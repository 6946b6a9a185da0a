import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from sparsekit.errors import DataError
from sparsekit.registry.installed import load_registry
from sparsekit.runs.run import execute
from sparsekit.runs.settings import resolve
from sparsekit.tasks import Mnist, mnist
from sparsekit.tasks.dense import Recipe

SHARED = Path(__file__).parents[2].parent / "shared"
SIZES = {"train": 10, "t10k": 7}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mnist, "RECIPE", Recipe(epochs=2, learning_rate=1e-3, batch_size=4))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def arrays():
    draw = np.random.default_rng(0)
    return {
        file: (draw.integers(0, 256, (size, 28, 28), dtype=np.uint8), np.arange(size, dtype=np.uint8))
        for file, size in SIZES.items()
    }


def encoded(values):
    return np.array([0x800 + values.ndim, *values.shape], dtype=">u4").tobytes() + values.tobytes()


@pytest.fixture
def folder(tmp_path, arrays):
    root = tmp_path / "mnist"
    root.mkdir()
    for file, (images, labels) in arrays.items():
        (root / f"{file}-images-idx3-ubyte").write_bytes(encoded(images))
        (root / f"{file}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(encoded(labels)))
    return root


def relabel(folder, labels):
    content = encoded(np.array(labels, dtype=np.uint8))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))


def task(folder, **settings):
    return Mnist(Mnist.Settings(data_dir=None if folder is None else str(folder), **settings))


def state(task):
    return dict(task.model().state_dict())


@pytest.mark.parametrize(
    "split, file, rows",
    [
        ("train", "train", slice(None)),
        ("tuning", "t10k", slice(0, None, 2)),
        ("reporting", "t10k", slice(1, None, 2)),
    ],
)
def test_splits_hold_their_images_and_labels_in_order(folder, arrays, split, file, rows):
    inputs, labels = zip(*task(folder).batches(split, batch_size=3), strict=True)
    pixels = (torch.cat(inputs) * 0.3081 + 0.1307).mul(255).round().to(torch.uint8)
    np.testing.assert_array_equal(pixels.squeeze(1).numpy(), arrays[file][0][rows])
    np.testing.assert_array_equal(torch.cat(labels).numpy(), arrays[file][1][rows])
    assert task(folder).size(split) == len(pixels)


def test_limited_examples_are_the_generator_s(folder):
    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.cat([y for _, y in task(folder).batches("train", batch_size=2, limit=5, generator=generator)])

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_fingerprint_is_of_pixels_and_labels(folder):
    before = task(folder).fingerprint()
    assert task(folder).fingerprint() == before
    relabel(folder, [0] * 7)
    assert task(folder).fingerprint() != before


def test_trained_network_is_cached_by_architecture(folder, own_cache, monkeypatch):
    first = state(task(folder))
    state(task(folder, architecture="lenet-300-100"))
    assert sorted(path.name.rsplit("-v1-")[0] for path in own_cache.iterdir()) == [
        "mnist-lenet-300-100",
        "mnist-lenet5",
    ]
    monkeypatch.setattr(mnist, "train", lambda *_: pytest.fail("trained again"))
    assert_close(state(task(folder)), first, rtol=0, atol=0)


def test_interrupted_training_ends_as_an_uninterrupted_one(folder, monkeypatch, tmp_path):
    def interrupt(done, total):
        if done == 4:  # of six, three an epoch
            raise KeyboardInterrupt

    one = task(folder)
    one.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        one.model()
    seen = []
    again = task(folder)
    again.progress = lambda done, total: seen.append(done)
    resumed = state(again)
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "other"))
    assert_close(resumed, state(task(folder)), rtol=0, atol=0)
    assert seen == [4, 5, 6]


def test_checkpoint_is_loaded_and_nothing_trained(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "train", lambda *_: pytest.fail("trained"))
    given = {name: torch.full_like(t, 0.5) for name, t in task(folder).network().state_dict().items()}
    save_file(given, tmp_path / "given.safetensors")
    assert_close(state(task(folder, checkpoint=str(tmp_path / "given.safetensors"))), given)


def test_missing_checkpoint_is_refused_at_once(folder, tmp_path):
    with pytest.raises(DataError, match="no checkpoint file .*; leave it out to train one"):
        task(folder, checkpoint=str(tmp_path / "absent.pt"))


def test_missing_data_directory_is_asked_for():
    with pytest.raises(DataError, match="the task 'mnist' needs --data-dir"):
        task(None)


def test_missing_labels_are_named(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="holds no t10k-labels-idx1-ubyte, plain or .gz; put it there"):
        task(folder).batches("tuning", batch_size=2)


def test_images_in_place_of_labels_are_refused(folder):
    content = (folder / "t10k-images-idx3-ubyte").read_bytes()
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match="t10k-labels.* holds no labels of bytes,.*: fetch it anew"):
        task(folder).batches("tuning", batch_size=2)


@pytest.mark.parametrize("labels", [[0] * 6, [0] * 6 + [10]], ids=["too few", "no class"])
def test_labels_that_do_not_fit_the_images_are_refused(folder, labels):
    relabel(folder, labels)
    with pytest.raises(DataError, match="labels up to .*; one from 0 to 9 for each of 7 images was needed"):
        task(folder).batches("tuning", batch_size=2)


def test_it_can_be_pruned(folder, tmp_path):
    settings = {
        "task": {"name": "mnist", "data_dir": str(folder), "architecture": "lenet-300-100"},
        "estimator": {"name": "diagonal", "examples": 8, "batch_size": 8},
        "schedule": "one-shot",
        "output": str(tmp_path / "runs"),
        "tracking": {"enabled": False},
    }
    registry = load_registry()
    record = execute(resolve(settings, registry), registry).record
    assert [level.achieved for level in record.levels] == pytest.approx([0.9, 0.95], abs=1e-4)


@pytest.mark.slow
def test_network_trained_on_mnist_is_good(monkeypatch):
    data = SHARED / "data" / "mnist"
    if not data.is_dir():
        pytest.skip("needs MNIST's files beside the repository")
    monkeypatch.setattr(mnist, "RECIPE", Recipe(epochs=1, learning_rate=1e-3, batch_size=128))
    one = task(data)
    assert one.measure(one.model(), "tuning")["accuracy"] > 0.97  # one epoch of the ten


def test_the_perceptron_has_its_own_recipe_and_epochs_are_a_setting(folder):
    plain = {"data_dir": str(folder)}

    def made(**given):
        return Mnist(Mnist.Settings(**plain, **given))

    assert made(architecture="mlp-300-100-tanh")._recipe().epochs == 20
    assert made(architecture="mlp-300-100-tanh", epochs=800)._recipe().decay_every == 0  # constant
    assert made(epochs=3)._recipe() == replace(made()._recipe(), epochs=3)
    paths = {made(**given)._cached_network() for given in ({}, {"epochs": 3}, {"architecture": "mlp-300-100-tanh"})}
    assert len(paths) == 3
