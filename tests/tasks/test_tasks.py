import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sparsekit.errors import DataError
from sparsekit.interfaces import TaskSettings
from sparsekit.models import resnet
from sparsekit.tasks import Cifar10, Digits
from sparsekit.tasks.cifar10 import Cifar10Settings
from sparsekit.tasks.images import ImageBatches

SHARED = Path(__file__).parents[2].parent / "shared"


def batches(**kwargs):
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 1, 2, 2).contiguous()
    options = {"mean": (0.0,), "std": (1 / 255,), "batch_size": 6} | kwargs
    return ImageBatches(images, torch.arange(20), **options)


def labels(made):
    return torch.cat([y for _, y in made]).tolist()


def test_stored_order_without_a_generator():
    assert labels(batches()) == list(range(20))


def test_images_travel_with_their_labels(generator):
    for x, y in batches(generator=generator):
        assert torch.allclose(x[:, 0, 0, 0], y.float())


def test_order_is_drawn_anew_at_each_iteration(generator):
    made = batches(generator=generator)
    assert labels(made) != labels(made)


def test_a_limited_subset_stays_the_same(generator):
    made = batches(generator=generator, limit=7)
    assert labels(made) == labels(made) and len(set(labels(made))) == 7


def test_augmentation_mirrors_and_shifts_within_the_padding(generator):
    x, _ = next(iter(batches(generator=generator, augment=True, padding=0)))
    assert x.shape == (6, 1, 2, 2)


def test_the_digits_network_is_good_and_the_same_each_time():
    task = Digits(TaskSettings())
    assert task.measure(task.model(), "tuning")["accuracy"] > 0.97
    assert all(torch.equal(a, b) for a, b in zip(task.model().parameters(), task.model().parameters(), strict=True))


def test_training_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Digits(TaskSettings(seed=7)).network()
    assert torch.equal(before, torch.get_rng_state())


def test_digits_splits_do_not_overlap():
    task = Digits(TaskSettings())
    assert [task.size(split) for split in ("train", "tuning", "reporting")] == [1297, 250, 250]


@pytest.fixture
def folder(tmp_path, generator):
    def cell(i):
        buffer = io.BytesIO()
        Image.fromarray(np.full((32, 32, 3), i, np.uint8)).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": f"{i}.png"}

    for name, count in (("train-00000-of-00002", 4), ("train-00001-of-00002", 3), ("test-00000-of-00001", 5)):
        table = pa.table({"img": [cell(i) for i in range(count)], "label": list(range(count))})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    torch.save(resnet(20).state_dict(), tmp_path / "dense.th")
    return tmp_path


def cifar10(folder, **settings):
    options = {"data_dir": str(folder), "checkpoint": str(folder / "dense.th")} | settings
    return Cifar10(Cifar10Settings(**options))


def test_cifar10_from_parquet(folder):
    task = cifar10(folder)
    assert [task.size(s) for s in ("train", "tuning", "reporting")] == [7, 3, 2]
    (images, targets), *_ = task.batches("reporting", batch_size=10)
    assert targets.tolist() == [1, 3]
    assert torch.allclose(images[0, 0, 0, 0], torch.tensor((1 / 255 - 0.485) / 0.229))


def test_only_the_splits_needed_are_read(folder):
    task = cifar10(folder)
    list(task.batches("tuning", batch_size=2))
    assert list(task._decoded) == ["test"]


def test_decoded_images_are_read_again_from_the_cache(folder):
    first = torch.cat([x for x, _ in cifar10(folder).batches("train", batch_size=2)])
    second = torch.cat([x for x, _ in cifar10(folder).batches("train", batch_size=2)])
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": None}, "give its weights by --checkpoint"),
        ({"checkpoint": "no.th"}, "no checkpoint file 'no.th'"),
        ({"data_dir": None}, "needs --data-dir"),
        ({"data_dir": "nowhere"}, "no data directory 'nowhere'"),
    ],
)
def test_what_is_missing_is_said_at_construction(folder, settings, message):
    with pytest.raises(DataError, match=message):
        cifar10(folder, **settings)


def test_an_empty_folder(folder, tmp_path_factory):
    with pytest.raises(DataError, match="holds neither"):
        cifar10(folder, data_dir=str(tmp_path_factory.mktemp("empty")))


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real images are not beside the repository")
def test_the_published_error_of_resnet20():
    task = Cifar10(
        Cifar10Settings(
            data_dir=str(SHARED / "data/cifar10"), checkpoint=str(SHARED / "checkpoints/resnet20-12fca82f.th")
        )
    )
    model = task.model()
    halves = [task.measure(model, split)["accuracy"] for split in ("tuning", "reporting")]
    assert sum(halves) / 2 == pytest.approx(0.9173)
