import pytest
import torch
from torch.testing import assert_close

from sparsekit.curvature import GaussNewton
from sparsekit.errors import DataError
from sparsekit.problem.objective import Objective
from sparsekit.problem.parameters import ParameterSpace
from sparsekit.registry.installed import load_registry
from sparsekit.runs.run import execute
from sparsekit.runs.settings import resolve
from sparsekit.tasks import Digits, DigitsTransformer, transformer
from sparsekit.tasks.dense import Recipe


@pytest.fixture
def brief(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(transformer, "RECIPE", Recipe(epochs=1, learning_rate=3e-3, batch_size=256))
    return tmp_path


def task(**settings):
    return DigitsTransformer(DigitsTransformer.Settings(**settings))


@pytest.mark.parametrize("split, size", [("train", 1297), ("tuning", 250), ("reporting", 250)])
def test_tokens_are_the_grey_levels_of_digits(split, size):
    tokens, labels = next(iter(task().batches(split, batch_size=2000)))
    images, expected = next(iter(Digits(Digits.Settings()).batches(split, batch_size=2000)))
    assert_close(tokens, ((images * 0.376 + 0.306) * 16).round().long().flatten(1))
    assert_close(labels, expected)
    assert len(tokens) == task().size(split) == size


def test_augmented_images_shift_by_a_pixel_and_are_never_mirrored():
    one = task()
    stored, _ = next(iter(one.batches("train", batch_size=100)))
    # drawn with a limit, the order is the same at every iteration and so known
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(1297, generator=torch.Generator().manual_seed(0))[:100]
    shifted, _ = next(iter(one.batches("train", batch_size=100, limit=100, generator=draw, augment=True)))
    everything, _ = next(iter(one.batches("train", batch_size=2000)))
    padded = torch.nn.functional.pad(everything[order].view(-1, 8, 8), (1, 1, 1, 1))
    candidates = torch.stack([padded[:, i : i + 8, j : j + 8].flatten(1) for i in range(3) for j in range(3)])
    assert (candidates == shifted).all(2).any(0).all()
    assert len(stored) == 100


def test_trained_network_is_cached_apart_from_that_of_digits(brief):
    first = dict(task().model().state_dict())
    (cached,) = brief.iterdir()
    assert cached.name.startswith("digits-transformer-")
    assert_close(dict(task().model().state_dict()), first, rtol=0, atol=0)


def test_data_directory_is_refused(tmp_path):
    with pytest.raises(DataError, match="the task 'digits-transformer' brings its own images"):
        task(data_dir=str(tmp_path))


def test_exact_products_pass_through_its_attention():
    model = task().network().eval()
    batches = list(task().batches("train", batch_size=4, limit=4))
    space = ParameterSpace.of(model)
    v = torch.randn(space.size, generator=torch.Generator().manual_seed(0))  # some directions change no loss at all
    assert torch.dot(v, GaussNewton(Objective(model, task().likelihood, batches, space)) @ v) > 0


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's, of fused attention
def test_it_can_be_pruned(brief):
    settings = {
        "task": "digits-transformer",
        "estimator": {"name": "diagonal", "examples": 8, "batch_size": 8},
        "schedule": "one-shot",
        "sparsity": [0.5],
        "finetune": {"epochs": 0},
        "output": str(brief / "runs"),
        "tracking": {"enabled": False},
    }
    registry = load_registry()
    seen = []
    record = execute(
        resolve(settings, registry), registry, progress=lambda phase, done, total: seen.append((phase, done, total))
    ).record
    assert record.levels[0].achieved == pytest.approx(0.5, abs=1e-4)
    assert [(done, total) for phase, done, total in seen if phase == "prepare"] == [
        (0, 1),
        *((k, 6) for k in range(1, 7)),
    ]


@pytest.mark.slow
def test_trained_network_is_good():
    one = task()
    model = one.model()
    assert sum(one.measure(model, split)["accuracy"] for split in ("tuning", "reporting")) / 2 >= 0.95
