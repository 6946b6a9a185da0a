import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from torchvision.datasets import MNIST

from sparsekit.errors import DataError
from sparsekit.tasks import MnistAutoencoder, autoencoder, idx
from sparsekit.tasks.dense import Recipe

SHARED = Path(__file__).parents[2].parent / "shared"
SIZES = {"train": 10, "t10k": 7}
NAMES = {file: f"{file}-images-idx3-ubyte" for file in SIZES}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(autoencoder, "RECIPE", Recipe(epochs=2, learning_rate=1e-3, batch_size=4))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def images():
    draw = np.random.default_rng(0)
    return {file: draw.integers(0, 256, (size, 28, 28), dtype=np.uint8) for file, size in SIZES.items()}


def encoded(pixels):
    return np.array([0x803, *pixels.shape], dtype=">u4").tobytes() + pixels.tobytes()


def write(folder, images, packed=False):
    folder.mkdir(parents=True)
    for file, name in NAMES.items():
        content = encoded(images[file])
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)


@pytest.fixture
def folder(tmp_path, images):
    write(tmp_path / "plain", images)
    return tmp_path / "plain"


def task(folder, **settings):
    return MnistAutoencoder(MnistAutoencoder.Settings(data_dir=None if folder is None else str(folder), **settings))


def state(task):
    return dict(task.model().state_dict())


def read(task, split):
    inputs, targets = zip(*task.batches(split, batch_size=3), strict=True)
    assert_close(torch.cat(inputs), torch.cat(targets))
    return torch.cat(inputs).mul(255).round().to(torch.uint8).view(-1, 28, 28).numpy()


@pytest.mark.parametrize(
    "split, file, rows",
    [
        ("train", "train", slice(None)),
        ("tuning", "t10k", slice(0, None, 2)),
        ("reporting", "t10k", slice(1, None, 2)),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("where", ["", "MNIST/raw"])
def test_splits_hold_their_images_in_order(tmp_path, images, split, file, rows, packed, where):
    write(tmp_path / "data" / where, images, packed)
    np.testing.assert_array_equal(read(task(tmp_path / "data"), split), images[file][rows])


@pytest.mark.parametrize("split, size", [("train", 10), ("tuning", 4), ("reporting", 3)])
def test_sizes_are_counted(folder, split, size):
    assert task(folder).size(split) == size


@pytest.mark.parametrize("absent, split", [("train", "reporting"), ("t10k", "train")])
def test_files_of_other_splits_are_not_read(folder, absent, split):
    (folder / NAMES[absent]).unlink()
    assert len(read(task(folder), split)) == task(folder).size(split)


def test_files_are_read_once_an_object(folder, monkeypatch):
    one = task(folder)
    read(one, "tuning")
    monkeypatch.setattr(idx, "_read", lambda *_: pytest.fail("read again"))
    read(one, "reporting")


def test_network_needs_no_data(folder, monkeypatch):
    monkeypatch.setattr(idx, "_read", lambda *_: pytest.fail("data were read"))
    assert [tuple(p.shape) for p in task(folder).network().parameters() if p.dim() > 1] == [
        (1000, 784),
        (500, 1000),
        (250, 500),
        (30, 250),
        (250, 30),
        (500, 250),
        (1000, 500),
        (784, 1000),
    ]


def test_fingerprint_is_of_the_pixels_and_not_of_their_packing(folder, tmp_path, images):
    write(tmp_path / "packed", images, packed=True)
    assert task(tmp_path / "packed").fingerprint() == task(folder).fingerprint()
    content = bytearray((folder / NAMES["t10k"]).read_bytes())
    content[-1] ^= 1
    (folder / NAMES["t10k"]).write_bytes(content)
    assert task(tmp_path / "packed").fingerprint() != task(folder).fingerprint()


def test_measures_nats_and_squared_error_an_image(folder, images):
    one = task(folder)
    model = one.network().eval()
    x = torch.from_numpy(images["t10k"][1::2]).double().flatten(1) / 255
    with torch.no_grad():
        p = model(x.float()).double().sigmoid()
    nats = -(x * p.log() + (1 - x) * (1 - p).log()).sum(1).mean()
    found = one.measure(model, "reporting")
    assert found == pytest.approx({"loss": float(nats), "squared_error": float((x - p).square().sum(1).mean())}, 1e-5)


def test_trained_network_is_cached(folder, own_cache, monkeypatch):
    first = state(task(folder))
    assert [path.suffix for path in own_cache.iterdir()] == [".safetensors"]
    monkeypatch.setattr(autoencoder, "train", lambda *_: pytest.fail("trained again"))
    assert_close(state(task(folder)), first, rtol=0, atol=0)


def test_other_images_train_another_network(folder, tmp_path, images, own_cache):
    task(folder).model()
    write(tmp_path / "other", {file: 255 - pixels for file, pixels in images.items()})
    task(tmp_path / "other").model()
    assert len(list(own_cache.iterdir())) == 2


def test_checkpoint_is_loaded_and_nothing_trained(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "train", lambda *_: pytest.fail("trained"))
    given = {name: torch.full_like(t, 0.5) for name, t in task(folder).network().state_dict().items()}
    save_file(given, tmp_path / "given.safetensors")
    assert_close(state(task(folder, checkpoint=str(tmp_path / "given.safetensors"))), given)


def test_missing_checkpoint_is_refused_at_once(folder, tmp_path):
    with pytest.raises(DataError, match="no checkpoint file .*; leave it out to train one"):
        task(folder, checkpoint=str(tmp_path / "absent.pt"))


def test_missing_data_directory_is_asked_for():
    with pytest.raises(DataError, match="needs --data-dir"):
        task(None)


def test_absent_data_directory_is_refused_at_once(tmp_path):
    with pytest.raises(DataError, match="no data directory .*absent"):
        task(tmp_path / "absent")


def test_folder_of_neither_layout_is_refused_at_once(tmp_path):
    with pytest.raises(DataError, match=r"holds neither train-images.* nor MNIST/raw; give another"):
        task(tmp_path)


def test_missing_file_is_named(folder):
    (folder / NAMES["train"]).unlink()
    with pytest.raises(DataError, match="holds no train-images-idx3-ubyte, plain or .gz; put it there"):
        task(folder).size("train")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        np.array([0x803, 10, 28, 28], dtype=">u4").tobytes(),
        np.array([0x803, 0, 28, 28], dtype=">u4").tobytes(),
        np.array([0x803, 1, 8, 8], dtype=">u4").tobytes() + bytes(64),
        np.array([0x801, 1, 28, 28], dtype=">u4").tobytes() + bytes(784),
    ],
    ids=["empty", "text", "truncated", "no images", "another size", "another kind"],
)
def test_what_is_no_idx_file_is_refused(folder, content):
    (folder / NAMES["train"]).write_bytes(content)
    with pytest.raises(DataError, match="train-images.* holds no 28 × 28 images .*: fetch it anew"):
        task(folder).size("train")


@pytest.mark.parametrize("kept", [0, 8, 200])
def test_damaged_gz_is_refused(tmp_path, images, kept):
    write(tmp_path / "packed", images, packed=True)
    path = tmp_path / "packed" / f"{NAMES['train']}.gz"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match="train-images.*fetch it anew"):
        task(tmp_path / "packed").size("train")


def test_download_is_torchvision_s(tmp_path, images, monkeypatch):
    def download(self):
        write(Path(self.raw_folder), images, packed=True)
        raise RuntimeError("the labels cannot be had")

    monkeypatch.setattr(MNIST, "download", download)
    with pytest.raises(DataError, match=r"cannot download MNIST .*\(the labels cannot be had\); put its idx files"):
        task(tmp_path, download=True).size("train")
    np.testing.assert_array_equal(read(task(tmp_path), "train"), images["train"])


@pytest.mark.slow
def test_network_trained_on_mnist_reconstructs(monkeypatch):
    data = SHARED / "data" / "mnist"
    if not data.is_dir():
        pytest.skip("needs MNIST's files beside the repository")
    monkeypatch.setattr(autoencoder, "RECIPE", Recipe(epochs=2, learning_rate=1e-3, batch_size=128))
    one = task(data)
    assert one.measure(one.model(), "tuning")["loss"] < 80  # two epochs of the twenty; a mean image has 206
