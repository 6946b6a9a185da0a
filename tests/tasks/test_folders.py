import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision import transforms

from sparsekit.errors import DataError
from sparsekit.tasks.folders import FolderBatches, decode, file_digest


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Seven images, higher than wide and wider than high, one of them grey."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for k in range(7):
        pixels = draw.integers(0, 256, (20, 30 + k, 3) if k % 2 else (40, 20), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{k}.png")
    return [(str(root / f"{k}.png"), k) for k in range(7)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def read(samples, **options):
    inputs, labels = zip(*FolderBatches(samples, batch_size=3, **options), strict=True)
    return torch.cat(inputs), torch.cat(labels)


def test_images_are_cut_and_normalised_as_torchvision_s_networks_need_them(samples):
    inputs, labels = read(samples)
    assert labels.tolist() == list(range(7))
    shorter = transforms.functional.resize(decode(samples[1][0]), 256)
    pixels = transforms.functional.to_tensor(transforms.functional.center_crop(shorter, [224, 224]))
    expected = transforms.functional.normalize(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert_close(inputs[1], expected)
    assert inputs.shape == (7, 3, 224, 224)


def test_limited_examples_are_the_generator_s(samples):
    first, again, other = (read(samples, limit=4, generator=generator(seed))[1].tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 4


def test_augmentation_is_the_generator_s(samples):
    first, again, other = (read(samples, generator=generator(s), augment=True)[0] for s in (0, 0, 1))
    assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other)


def test_augmentation_is_drawn_anew_at_each_iteration(samples):
    batches = FolderBatches(samples, batch_size=7, limit=7, generator=generator(), augment=True)
    (first, _), (second, _) = next(iter(batches)), next(iter(batches))
    assert not torch.equal(first, second)


def test_augmentation_differs_between_images(samples):
    same = [samples[1]] * 6
    assert len(read(same, generator=generator(), augment=True)[0].flatten(1).unique(dim=0)) == 6


def test_global_generator_is_untouched(samples):
    before = torch.get_rng_state()
    read(samples, generator=generator(), augment=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_without_a_generator_is_refused(samples):
    with pytest.raises(ValueError, match="needs a generator"):
        FolderBatches(samples, batch_size=2, augment=True)


@pytest.mark.slow
def test_workers_change_nothing(samples):
    one, two = (read(samples, generator=generator(), augment=True, workers=workers) for workers in (0, 2))
    assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kept", [0, 100], ids=["empty", "truncated"])
def test_damaged_image_is_named(samples, tmp_path, workers, kept):
    with open(samples[0][0], "rb") as file:
        (tmp_path / "damaged.png").write_bytes(file.read()[:kept])
    with pytest.raises(DataError, match=r"^'.*damaged\.png' cannot be read as an image .*: fetch it anew"):
        read([*samples, (str(tmp_path / "damaged.png"), 0)], workers=workers)


def test_digest_is_of_names_and_sizes_below_the_folder(tmp_path):
    digests = []
    for folder, name, content in [("a", "x", b"12"), ("b", "x", b"34"), ("c", "y", b"12"), ("d", "x", b"123")]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(content)
        digests.append(file_digest(tmp_path / folder, [str(tmp_path / folder / name)]))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
