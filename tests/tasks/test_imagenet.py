import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.models import ResNet18_Weights

from sparsekit.errors import DataError
from sparsekit.registry.installed import load_registry
from sparsekit.runs.run import execute
from sparsekit.runs.settings import resolve
from sparsekit.tasks import ImageNet, imagenet

CLASSES = ["n01", "n02", "n03"]


@pytest.fixture
def folder(tmp_path):
    """Twelve training and seven validation images; the level of grey tells which."""
    root = tmp_path / "imagenet"
    for part, counts in (("train", (4, 4, 4)), ("val", (3, 2, 2))):
        level = 0
        for name, count in zip(CLASSES, counts, strict=True):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((20, 24, 3), level, dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{part}_{i}.JPEG")
                level += 20
    return root


@pytest.fixture
def checkpoint(folder, tmp_path):
    path = tmp_path / "resnet18.pt"
    untrained = ImageNet(ImageNet.Settings(data_dir=str(folder), architecture="resnet18", seed=5, download=True))
    torch.save(untrained.network().state_dict(), path)
    return path


@pytest.fixture
def task(folder, checkpoint):
    def build(**settings):
        given = {"data_dir": str(folder), "architecture": "resnet18", "checkpoint": str(checkpoint)}
        return ImageNet(ImageNet.Settings(**(given | settings)))

    return build


def levels(task, split, **options):
    inputs, labels = zip(*task.batches(split, batch_size=3, **options), strict=True)
    return (torch.cat(inputs)[:, 0, 0, 0] * 0.229 + 0.485).mul(255).round().int().tolist(), torch.cat(labels).tolist()


@pytest.mark.parametrize(
    "split, expected, labels",
    [
        ("train", list(range(0, 240, 20)), [0] * 4 + [1] * 4 + [2] * 4),
        ("tuning", [0, 40, 80, 120], [0, 0, 1, 2]),
        ("reporting", [20, 60, 100], [0, 1, 2]),
    ],
)
def test_splits_hold_their_images_in_order(task, split, expected, labels):
    found, found_labels = levels(task(), split)
    assert found == pytest.approx(expected, abs=1)  # JPEG
    assert found_labels == labels
    assert task().size(split) == len(expected)


def test_limited_examples_are_the_generator_s(task):
    first, again, other = (
        levels(task(), "train", limit=5, generator=torch.Generator().manual_seed(s))[0] for s in (0, 0, 1)
    )
    assert first == again != other


def test_fingerprint_changes_with_names_and_sizes(task, folder):
    before = task().fingerprint()
    assert task(seed=1).fingerprint() == before
    (folder / "val" / "n01" / "val_0.JPEG").rename(folder / "val" / "n02" / "val_9.JPEG")
    renamed = task().fingerprint()
    Image.new("RGB", (90, 90)).save(folder / "val" / "n02" / "val_9.JPEG")
    assert len({before, renamed, task().fingerprint()}) == 3


def test_network_is_torchvision_s_with_as_many_classes_as_the_folder(task):
    assert task().network().fc.out_features == 3
    assert task(architecture="mobilenet_v2").network().classifier[1].out_features == 3


def test_resnet50_is_the_default():
    assert ImageNet.Settings().architecture == "resnet50"


def test_model_has_the_checkpoint_s_weights(task, checkpoint):
    model = task().model()
    assert_close(dict(model.state_dict()), dict(torch.load(checkpoint, weights_only=True)))
    assert not model.training


def test_checkpoint_of_other_classes_is_refused(task, folder):
    for part in ("train", "val"):
        (folder / part / "n04").mkdir()
    with pytest.raises(DataError, match=r"'fc.weight' has shape \(3, 512\), \(4, 512\) was needed"):
        task().model()


def test_torchvision_s_weights_are_downloaded(task, monkeypatch):
    published = task(seed=9).network().state_dict()
    monkeypatch.setattr(imagenet, "PUBLISHED_CLASSES", 3)
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda *_, **__: published)
    assert_close(dict(task(checkpoint=None, download=True).model().state_dict()), dict(published))


def test_failed_download_is_one_sentence(task, monkeypatch):
    def download(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(imagenet, "PUBLISHED_CLASSES", 3)
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", download)
    with pytest.raises(DataError, match=r"cannot download the weights of resnet18 \(no network\); give them by"):
        task(checkpoint=None, download=True).model()


def test_unknown_weights_are_refused(task, monkeypatch):
    monkeypatch.setattr(imagenet, "PUBLISHED_CLASSES", 3)
    with pytest.raises(DataError, match="no weights 'V9' of resnet18; set task.weights to one of IMAGENET1K_V1"):
        task(checkpoint=None, download=True, weights="V9").model()


def test_torchvision_s_weights_for_other_classes_are_refused(task):
    with pytest.raises(DataError, match="has 3 classes, torchvision's weights 1000; give weights that fit"):
        task(checkpoint=None, download=True).model()


def test_missing_weights_are_asked_for(task):
    with pytest.raises(DataError, match="prunes a trained resnet18; give its weights by --checkpoint, or set"):
        task(checkpoint=None)


def test_absent_checkpoint_is_refused_at_once(task, tmp_path):
    with pytest.raises(DataError, match=r"no checkpoint file .*absent\.pt"):
        task(checkpoint=str(tmp_path / "absent.pt"))


@pytest.mark.parametrize(
    "given, said", [("resnet5O", "did you mean 'resnet50'"), ("xyz", "list_models"), ("fcn_resnet50", "no classif")]
)
def test_unknown_architecture_is_refused_at_once(task, given, said):
    with pytest.raises(DataError, match=f"no classification network '{given}'|{said}") as found:
        task(architecture=given)
    assert said in str(found.value)


def test_missing_data_directory_is_asked_for(task):
    with pytest.raises(DataError, match="the task 'imagenet' needs --data-dir"):
        task(data_dir=None)


def test_absent_data_directory_is_refused_at_once(task, tmp_path):
    with pytest.raises(DataError, match="no data directory .*absent"):
        task(data_dir=str(tmp_path / "absent"))


def test_missing_folders_are_named_at_once(task, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no folder train and no val; train/<class>/"):
        task(data_dir=str(tmp_path / "empty"))


def test_classes_of_one_folder_alone_are_refused(task, folder):
    (folder / "train" / "n04").mkdir()
    with pytest.raises(DataError, match="has 4 classes in train and 3 in val"):
        task().network()


def test_class_without_images_is_named(task, folder):
    for part in ("train", "val"):
        (folder / part / "n04").mkdir()
    with pytest.raises(DataError, match=r"val' cannot be listed \(.*n04.*\); images in a folder for each class"):
        task().size("tuning")


@pytest.mark.slow
def test_it_can_be_pruned(folder, checkpoint, tmp_path):
    settings = {
        "task": {
            "name": "imagenet",
            "data_dir": str(folder),
            "architecture": "resnet18",
            "checkpoint": str(checkpoint),
        },
        "estimator": {"name": "diagonal", "examples": 4, "batch_size": 4},
        "schedule": "one-shot",
        "finetune": {"epochs": 1, "batch_size": 6},
        "sparsity": [0.5],
        "output": str(tmp_path / "runs"),
        "tracking": {"enabled": False},
    }
    registry = load_registry()
    record = execute(resolve(settings, registry), registry).record
    assert record.levels[0].achieved == pytest.approx(0.5, abs=1e-4)
