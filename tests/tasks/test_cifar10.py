import hashlib
import io
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.datasets import CIFAR10

from sparsekit.errors import DataError
from sparsekit.models import resnet, resnet18
from sparsekit.registry.installed import load_registry
from sparsekit.runs.run import execute
from sparsekit.runs.settings import resolve
from sparsekit.tasks import Cifar10, cifar10

SHARED = Path(__file__).parents[2].parent / "shared"
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
SIZES = {"train": 10, "test": 7}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "resnet20.th"
    torch.save({"state_dict": {f"module.{n}": t for n, t in resnet(20).state_dict().items()}}, path)
    return path


@pytest.fixture(scope="session")
def arrays():
    draw = np.random.default_rng(0)
    return {
        part: (draw.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8), [i % 10 for i in range(size)])
        for part, size in SIZES.items()
    }


def encoded(image, form="WEBP"):
    out = io.BytesIO()
    Image.fromarray(image).save(out, form, lossless=True)
    return {"bytes": out.getvalue(), "path": "image"}


def write(path, images, labels, column="img"):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({column: images, "label": labels}), path)


@pytest.fixture
def parquet(tmp_path, arrays):
    images, labels = arrays["train"]
    for shard in range(2):
        rows = slice(5 * shard, 5 * shard + 5)
        path = tmp_path / "parquet" / f"train-0000{shard}-of-00002.parquet"
        write(path, [encoded(i) for i in images[rows]], labels[rows])
    images, labels = arrays["test"]
    write(tmp_path / "parquet" / "test-00000-of-00001.parquet", [encoded(i, "PNG") for i in images], labels)
    return tmp_path / "parquet"


@pytest.fixture
def pickled(tmp_path, arrays, monkeypatch):
    folder = tmp_path / "pickled" / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def dump(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name, part, rows):
        images, labels = arrays[part]
        return dump(name, {"data": images[rows].transpose(0, 3, 1, 2).reshape(-1, 3072), "labels": labels[rows]})

    # torchvision knows the official files by their md5.
    train = [batch(f"data_batch_{k + 1}", "train", slice(2 * k, 2 * k + 2)) for k in range(5)]
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", "test", slice(None))])
    name, md5 = dump("batches.meta", {"label_names": [str(c) for c in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return tmp_path / "pickled"


@pytest.fixture(params=["parquet", "pickled"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def task(checkpoint):
    def build(folder, **settings):
        return Cifar10(Cifar10.Settings(**({"data_dir": str(folder), "checkpoint": str(checkpoint)} | settings)))

    return build


def read(task, split):
    inputs, labels = zip(*task.batches(split, batch_size=3), strict=True)
    pixels = (torch.cat(inputs) * STD + MEAN).mul(255).round().to(torch.uint8)
    return pixels.movedim(1, -1).numpy(), torch.cat(labels).tolist()


@pytest.mark.parametrize(
    "split, part, rows",
    [
        ("train", "train", slice(None)),
        ("tuning", "test", slice(0, None, 2)),
        ("reporting", "test", slice(1, None, 2)),
    ],
)
def test_splits_hold_their_images_in_order(task, folder, arrays, split, part, rows):
    images, labels = arrays[part]
    found, found_labels = read(task(folder), split)
    np.testing.assert_array_equal(found, images[rows])
    assert found_labels == labels[rows]


@pytest.mark.parametrize("split, size", [("train", 10), ("tuning", 4), ("reporting", 3)])
def test_sizes_are_counted(task, folder, split, size):
    assert task(folder).size(split) == size


def test_column_may_be_called_image(task, tmp_path, arrays):
    images, labels = arrays["test"]
    for part in ("train", "test"):
        write(tmp_path / "hub" / f"{part}-0.parquet", [encoded(i) for i in images], labels, column="image")
    np.testing.assert_array_equal(read(task(tmp_path / "hub"), "tuning")[0], images[::2])


def test_training_images_are_not_read_for_the_test_s(task, parquet):
    for path in parquet.glob("train-*"):
        path.unlink()
    assert len(read(task(parquet), "reporting")[1]) == 3


def test_sizes_decode_nothing(task, parquet, monkeypatch):
    monkeypatch.setattr(cifar10, "_decode", lambda _: pytest.fail("images were decoded"))
    task(parquet).size("train")


def test_decoded_images_are_read_once_an_object(task, parquet, monkeypatch):
    one = task(parquet)
    read(one, "tuning")
    monkeypatch.setattr(Cifar10, "_from_parquet", lambda *_: pytest.fail("read again"))
    read(one, "reporting")


def test_decoded_images_are_cached_for_the_next_object(task, parquet, monkeypatch):
    before, _ = read(task(parquet), "tuning")
    monkeypatch.setattr(cifar10, "_decode", lambda _: pytest.fail("images were decoded again"))
    np.testing.assert_array_equal(read(task(parquet), "tuning")[0], before)


def test_changed_files_are_decoded_again(task, parquet, arrays):
    read(task(parquet), "tuning")
    images, labels = arrays["train"]
    write(parquet / "test-00000-of-00001.parquet", [encoded(i) for i in images], labels)
    np.testing.assert_array_equal(read(task(parquet), "tuning")[0], images[::2])


@pytest.mark.parametrize("kept", [0, 3, 200, 5000])
def test_damaged_cache_is_decoded_again(task, parquet, own_cache, arrays, kept):
    read(task(parquet), "tuning")
    (cached,) = own_cache.iterdir()
    cached.write_bytes(cached.read_bytes()[:kept])
    np.testing.assert_array_equal(read(task(parquet), "tuning")[0], arrays["test"][0][::2])


def test_a_cache_that_cannot_be_written_is_named_before_decoding(task, parquet, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(cifar10, "_decode", lambda _: pytest.fail("images were decoded"))
    with pytest.raises(DataError, match="cannot write .*set the environment variable SPARSEKIT_CACHE"):
        task(parquet).batches("tuning", batch_size=2)


def test_fingerprint_is_of_the_contents(task, parquet):
    before = task(parquet).fingerprint()
    path = parquet / "train-00001-of-00002.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    assert task(parquet).fingerprint() != before


def test_fingerprint_does_not_depend_on_the_folder(task, folder, tmp_path):
    before = task(folder).fingerprint()
    assert task(folder.rename(tmp_path / "elsewhere")).fingerprint() == before


def test_fingerprint_covers_files_that_are_yet_to_be_downloaded(task, pickled, tmp_path, monkeypatch):
    expected = task(pickled).fingerprint()

    def download(self):
        (pickled / "cifar-10-batches-py").rename(Path(self.root) / "cifar-10-batches-py")

    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(CIFAR10, "download", download)
    assert task(tmp_path / "empty", download=True).fingerprint() == expected


def test_failed_download_is_one_sentence(task, tmp_path, monkeypatch):
    def download(self):
        raise OSError("no network")

    monkeypatch.setattr(CIFAR10, "download", download)
    with pytest.raises(DataError, match=r"cannot read CIFAR-10 .*\(no network\); put a whole"):
        task(tmp_path, download=True).batches("train", batch_size=2)


def test_torchvision_folder_without_its_files_is_refused(task, tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match=r"torchvision cannot read CIFAR-10 .* put a whole"):
        task(tmp_path).fingerprint()


def test_model_has_the_checkpoint_s_weights(task, parquet, checkpoint):
    given = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert_close({f"module.{n}": t for n, t in task(parquet).model().state_dict().items()}, dict(given))


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_network_is_of_the_architecture(task, parquet, depth):
    network = task(parquet, architecture=f"resnet{depth}").network()
    assert network.state_dict().keys() == resnet(depth).state_dict().keys()


def test_resnet18_without_a_checkpoint_is_trained_and_cached(task, folder, own_cache, monkeypatch):
    monkeypatch.setattr(cifar10, "train", lambda model, *_: model.fc.bias.data.fill_(7))
    wanted = {"architecture": "resnet18", "checkpoint": None}
    assert set(task(folder, **wanted).model().fc.bias.tolist()) == {7}
    monkeypatch.setattr(cifar10, "train", lambda *_: pytest.fail("trained again"))
    assert set(task(folder, **wanted).model().fc.bias.tolist()) == {7}


def test_epochs_of_resnet18_s_training_name_another_network(task, parquet, own_cache, monkeypatch):
    monkeypatch.setattr(cifar10, "train", lambda *_: None)
    for epochs in (1, 2):
        task(parquet, architecture="resnet18", checkpoint=None, epochs=epochs).model()
    assert len(list(own_cache.glob("cifar10-resnet18-*.safetensors"))) == 2


def test_a_checkpoint_of_resnet18_is_loaded_and_nothing_trained(task, parquet, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "train", lambda *_: pytest.fail("trained"))
    given = resnet18(10).state_dict()
    torch.save(given, tmp_path / "resnet18.pt")
    one = task(parquet, architecture="resnet18", checkpoint=str(tmp_path / "resnet18.pt"))
    assert_close(dict(one.model().state_dict()), dict(given))


def test_absent_checkpoint_of_resnet18_may_be_left_out(task, parquet, tmp_path):
    with pytest.raises(DataError, match="no checkpoint file .*; leave it out to train one"):
        task(parquet, architecture="resnet18", checkpoint=str(tmp_path / "absent.pt"))


@pytest.mark.slow
def test_interrupted_training_ends_as_an_uninterrupted_one(task, parquet, monkeypatch, tmp_path):
    monkeypatch.setattr(cifar10, "RESIDUAL", replace(cifar10.RESIDUAL, batch_size=4))  # three batches an epoch

    def build(stop=None):
        one = task(parquet, architecture="resnet18", checkpoint=None, epochs=2)
        one.seen = []

        def progress(done, total):
            one.seen.append(done)
            if done == stop:
                raise KeyboardInterrupt

        one.progress = progress
        return one

    with pytest.raises(KeyboardInterrupt):
        build(stop=4).model()
    again = build()
    resumed = dict(again.model().state_dict())
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "other"))
    assert_close(resumed, dict(build().model().state_dict()), rtol=0, atol=0)
    assert again.seen == [4, 5, 6]


@pytest.mark.slow
def test_resnet18_can_be_pruned(parquet, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "train", lambda *_: None)
    settings = {
        "task": {"name": "cifar10", "data_dir": str(parquet), "architecture": "resnet18"},
        "estimator": {"name": "diagonal", "examples": 4, "batch_size": 4},
        "schedule": "one-shot",
        "sparsity": [0.9],
        "output": str(tmp_path / "runs"),
        "tracking": {"enabled": False},
    }
    registry = load_registry()
    record = execute(resolve(settings, registry), registry).record
    assert record.levels[0].achieved == pytest.approx(0.9, abs=1e-4)


def test_checkpoint_of_another_architecture_is_refused(task, parquet):
    with pytest.raises(DataError, match="does not fit CifarResNet"):
        task(parquet, architecture="resnet32").model()


def test_missing_checkpoint_is_asked_for(task, parquet):
    with pytest.raises(DataError, match="prunes a trained resnet20; give its weights by --checkpoint"):
        task(parquet, checkpoint=None)


def test_absent_checkpoint_is_refused_at_once(task, parquet, tmp_path):
    with pytest.raises(DataError, match=r"no checkpoint file .*absent\.th"):
        task(parquet, checkpoint=str(tmp_path / "absent.th"))


def test_missing_data_directory_is_asked_for(task):
    with pytest.raises(DataError, match="needs --data-dir"):
        task(None, data_dir=None)


def test_absent_data_directory_is_refused_at_once(task, tmp_path):
    with pytest.raises(DataError, match="no data directory .*absent"):
        task(tmp_path / "absent")


def test_folder_of_neither_layout_is_refused_at_once(task, tmp_path):
    with pytest.raises(DataError, match="holds neither .*parquet nor cifar-10-batches-py; give another"):
        task(tmp_path)


def test_missing_training_shards_are_named(task, parquet):
    for path in parquet.glob("train-*"):
        path.unlink()
    with pytest.raises(DataError, match=r"holds no train-\*\.parquet; put them there"):
        task(parquet).size("train")


@pytest.mark.parametrize("ask", [lambda t: t.size("train"), lambda t: t.batches("train", batch_size=2)])
def test_damaged_parquet_is_refused(task, parquet, ask):
    (parquet / "train-00000-of-00002.parquet").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"train-00000.* cannot be read .*: fetch it anew"):
        ask(task(parquet))


@pytest.mark.parametrize(
    "cell",
    [
        {"bytes": b"nonsense", "path": ""},
        {"bytes": None, "path": "only-a-path.png"},
        encoded(np.zeros((8, 8, 3), np.uint8), "PNG"),
        7,
    ],
    ids=["not an image", "no bytes", "another size", "no struct"],
)
def test_what_is_no_image_is_refused(task, parquet, cell):
    write(parquet / "test-00000-of-00001.parquet", [cell], [0])
    with pytest.raises(DataError, match=r"test-00000.* cannot be read .* 32 × 32 images was needed"):
        task(parquet).batches("tuning", batch_size=2)


@pytest.mark.parametrize("label", [10, -1, None])
def test_labels_of_no_class_are_refused(task, parquet, label):
    cell = encoded(np.zeros((32, 32, 3), np.uint8))
    write(parquet / "test-00000-of-00001.parquet", [cell, cell], [0, label])
    with pytest.raises(DataError, match="labels outside 0 to 9"):
        task(parquet).batches("tuning", batch_size=2)


def test_other_columns_are_named(task, parquet):
    write(parquet / "test-00000-of-00001.parquet", [b""], [0], column="picture")
    with pytest.raises(DataError, match="has the columns picture, label; 'img' or 'image', and 'label', were needed"):
        task(parquet).batches("tuning", batch_size=2)


@pytest.mark.slow
def test_published_network_has_its_published_accuracy(task):
    data, weights = SHARED / "data" / "cifar10", SHARED / "checkpoints" / "resnet20-12fca82f.th"
    if not (weights.is_file() and any(data.glob("test-*.parquet"))):
        pytest.skip("needs the published checkpoint and the test images beside the repository")
    published = task(data, checkpoint=str(weights))
    model = published.model()
    right = sum(published.measure(model, s)["accuracy"] * published.size(s) for s in ("tuning", "reporting"))
    # 9,173 of 10,000; one image more or less for other processors' sums.
    assert right == pytest.approx(9173, abs=1)
