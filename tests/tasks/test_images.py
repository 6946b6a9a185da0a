import pytest
import torch
from torch.testing import assert_close

from sparsekit.tasks.images import ImageBatches, Order, cache_directory

COUNT = 23


@pytest.fixture
def images():
    return torch.randint(0, 256, (COUNT, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def batches(images):
    def build(**options):
        settings = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "batch_size": 5} | options
        return ImageBatches(images, torch.arange(COUNT), **settings)

    return build


def labels(found):
    return torch.cat([targets for _, targets in found]).tolist()


def inputs(found):
    return torch.cat([pixels for pixels, _ in found])


def test_order_is_as_stored_without_a_generator(batches):
    assert labels(batches()) == list(range(COUNT))


def test_last_batch_is_short(batches):
    assert [len(targets) for _, targets in batches()] == [5, 5, 5, 5, 3]


def test_pixels_are_normalised_by_channel(batches, images):
    expected = torch.empty(images.shape)
    for channel, (mean, std) in enumerate(zip((0.1, 0.2, 0.3), (0.5, 0.6, 0.7), strict=True)):
        expected[:, channel] = (images[:, channel] / 255 - mean) / std
    assert_close(inputs(batches()), expected)


def test_batches_are_float_inputs_and_integer_targets(batches):
    pixels, targets = next(iter(batches()))
    assert (pixels.dtype, targets.dtype) == (torch.float32, torch.int64)


def test_inputs_follow_their_labels_when_shuffled(batches, generator):
    straight = inputs(batches())
    for pixels, targets in batches(generator=generator):
        assert_close(pixels, straight[targets])


def test_generator_permutes(batches, generator):
    order = labels(batches(generator=generator))
    assert order != list(range(COUNT))
    assert sorted(order) == list(range(COUNT))


def test_order_is_drawn_anew_at_each_iteration(batches, generator):
    shuffled = batches(generator=generator)
    assert labels(shuffled) != labels(shuffled)


def test_order_is_the_generator_s(batches):
    first, second = (labels(batches(generator=torch.Generator().manual_seed(3))) for _ in range(2))
    assert first == second


def test_limit_without_a_generator_takes_the_first(batches):
    assert labels(batches(limit=7)) == list(range(7))


def test_limit_with_a_generator_draws_a_subset(batches, generator):
    chosen = labels(batches(limit=7, generator=generator))
    assert len(set(chosen)) == 7
    assert chosen != list(range(7))


def test_limited_subset_is_the_same_at_each_iteration(batches, generator):
    subset = batches(limit=7, generator=generator)
    assert labels(subset) == labels(subset)


def test_limited_subset_draws_nothing_after_construction(batches, generator):
    subset = batches(limit=7, generator=generator)
    before = generator.get_state()
    list(subset)
    assert torch.equal(generator.get_state(), before)


def test_limit_beyond_the_end_takes_all(batches):
    assert labels(batches(limit=100)) == list(range(COUNT))


def test_global_generator_is_untouched(batches, generator):
    before = torch.get_rng_state()
    list(batches(generator=generator, augment=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_without_a_generator_is_refused(batches):
    with pytest.raises(ValueError, match="needs a generator"):
        batches(augment=True)


def test_augmented_images_are_shifted_or_mirrored_originals(batches, images, generator):
    # Padding 1 leaves 3 × 3 places and a mirror: few enough to look at all 18.
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    for pixels, targets in batches(generator=generator, augment=True, padding=1, **plain):
        for image, target in zip(pixels, targets, strict=True):
            padded = torch.nn.functional.pad(images[target], (1, 1, 1, 1))
            crops = [padded[:, t : t + 6, left : left + 5] / 255 for t in range(3) for left in range(3)]
            assert any(torch.equal(image, c) or torch.equal(image, c.flip(2)) for c in crops)


def test_augmentation_reaches_every_shift_and_mirror(generator):
    image = torch.arange(1, 31, dtype=torch.uint8).view(1, 1, 6, 5).expand(2000, -1, -1, -1)
    found = ImageBatches(
        image,
        torch.zeros(2000, dtype=torch.int64),
        mean=(0.0,),
        std=(1.0,),
        batch_size=500,
        generator=generator,
        augment=True,
        padding=1,
    )
    assert len(inputs(found).flatten(1).unique(dim=0)) == 18


def test_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path


def test_cache_lies_in_the_platform_s_folder_otherwise(monkeypatch):
    monkeypatch.delenv("SPARSEKIT_CACHE")
    assert cache_directory().name == "sparsekit"


def test_no_examples_are_no_batches():
    assert list(Order(5, batch_size=2, limit=0, generator=None)) == []
