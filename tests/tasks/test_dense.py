"""Training that can be interrupted, on the smallest of tasks."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sparsekit.errors import CurvatureError
from sparsekit.methods.interfaces import Task, TaskSettings
from sparsekit.problem.likelihoods import Categorical
from sparsekit.tasks import dense
from sparsekit.tasks.dense import MomentumRecipe, Recipe, StepwiseRecipe, cached_network, dense_network, train

RECIPE = Recipe(epochs=3, learning_rate=0.1, batch_size=4)
STEPS = 3  # an epoch


class Points(Task):
    """Ten points in two classes; training stops with KeyboardInterrupt at the step `stop`."""

    name = "points"
    likelihood = Categorical()
    stop: int | None = None

    recipe = RECIPE

    def network(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 2))

    def model(self):
        return dense_network(self, lambda: self.cached, lambda model: train(model, self, self.recipe, self.cached))

    def size(self, split):
        return 10

    def batches(self, split, *, batch_size, limit=None, generator=None, augment=False):
        x = torch.arange(20.0).view(10, 2) / 20
        for rows in torch.randperm(10, generator=generator).split(batch_size):
            yield x[rows], (x[rows, 0] > 0.5).long()

    def fingerprint(self):
        return ""


@pytest.fixture
def build(tmp_path):
    def points(folder="a", stop=None, seed=0):
        task = Points(TaskSettings(seed=seed))
        task.cached = tmp_path / folder / "points.safetensors"
        task.seen = []

        def progress(done, total):
            task.seen.append((done, total))
            if done == stop:
                raise KeyboardInterrupt

        task.progress = progress
        return task

    return points


@pytest.mark.parametrize("stop", [2, 3, 5, 9])
def test_interrupted_training_ends_as_an_uninterrupted_one(build, stop):
    with pytest.raises(KeyboardInterrupt):
        build(stop=stop).model()
    again = build()
    state = again.model().state_dict()
    assert_close(state, build("b").model().state_dict(), rtol=0, atol=0)
    # progress is told before an epoch is saved, so that one that stops at its last step is done again
    assert again.seen == [(step, 9) for step in range((stop - 1) // STEPS * STEPS + 1, 10)]


@pytest.mark.parametrize("recipe", [RECIPE, MomentumRecipe(3, 0.1, 4)], ids=["adam", "momentum"])
@pytest.mark.parametrize("stop", [2, 3, 6])
def test_long_epochs_are_saved_within(build, monkeypatch, recipe, stop):
    monkeypatch.setattr(dense, "SAVE_EVERY", 0)
    monkeypatch.setattr(Points, "recipe", recipe)
    with pytest.raises(KeyboardInterrupt):
        build(stop=stop).model()
    again = build()
    assert_close(again.model().state_dict(), build("b").model().state_dict(), rtol=0, atol=0)
    assert again.seen == [(step, 9) for step in range(stop, 10)]


def test_state_of_a_version_that_counted_epochs_is_thrown_away(build):
    task = build()
    task.cached.parent.mkdir()
    torch.save({"epochs": 2, "model": {}, "optimiser": {}}, task.cached.with_suffix(".unfinished"))
    task.model()
    assert len(task.seen) == 9


@pytest.mark.gpu
def test_training_is_on_the_task_s_device_and_its_network_on_the_cpu(build, accelerator):
    task, seen = build(), []
    task.device, memory = accelerator, torch.get_device_module(accelerator)
    task.progress = lambda *_: seen.append(memory.memory_allocated() > 0)
    assert {p.device.type for p in task.model().parameters()} == {"cpu"}
    assert all(seen)


def test_only_the_network_is_left(build):
    task = build()
    task.model()
    assert [path.name for path in task.cached.parent.iterdir()] == ["points.safetensors"]


@pytest.mark.parametrize("damage", [b"", b"nonsense", None], ids=["empty", "text", "truncated"])
def test_damaged_rest_of_an_interrupted_training_is_thrown_away(build, damage):
    with pytest.raises(KeyboardInterrupt):
        build(stop=5).model()
    task = build()
    (rest,) = task.cached.parent.iterdir()
    rest.write_bytes(rest.read_bytes()[:1000] if damage is None else damage)
    assert_close(task.model().state_dict(), build("b").model().state_dict(), rtol=0, atol=0)
    assert len(task.seen) == 9


def test_training_leaves_the_global_generator_alone(build):
    before = torch.get_rng_state()
    build().model()
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_give_different_networks(build):
    assert not torch.equal(build("a").model()[0].weight, build("b", seed=1).model()[0].weight)


def test_recipes_have_names_of_their_own():
    assert Recipe(3, 0.1, 4).hash == RECIPE.hash != Recipe(3, 0.1, 8).hash
    assert MomentumRecipe(3, 0.1, 4).hash not in {RECIPE.hash, MomentumRecipe(3, 0.1, 4, momentum=0.5).hash}


def test_recipes_keep_their_names():
    assert Recipe(epochs=20, learning_rate=1e-3, batch_size=128).hash == "09f4dd64"  # of cached autoencoders


def test_cached_networks_are_named_by_data_and_seed(build):
    names = {cached_network(build(seed=s), "points", RECIPE, data).name for s in (0, 1) for data in ("a" * 9, "b" * 9)}
    assert f"points-{RECIPE.hash}-aaaaaaaa-seed1.safetensors" in names
    assert len(names) == 4


def test_momentum_is_torch_s(build):
    (group,) = MomentumRecipe(3, 0.1, 4, weight_decay=0.01).optimiser(build().network()).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0.01)


def test_training_whose_loss_is_not_finite_is_refused_and_leaves_no_network(build, monkeypatch):
    monkeypatch.setattr(Points, "recipe", MomentumRecipe(3, 1e30, 4))
    task = build()
    with pytest.raises(CurvatureError, match="the loss became .* in training step .*--checkpoint"):
        task.model()
    assert not task.cached.exists()


def test_a_stepwise_recipe_falls_after_epochs():
    recipe = StepwiseRecipe(epochs=4, learning_rate=0.1, batch_size=8, decay_every=2)
    optimiser = recipe.optimiser(torch.nn.Linear(1, 1))
    schedule, seen = recipe.schedule(optimiser, 12, 3, 0), []
    for _ in range(12):
        seen.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert seen == pytest.approx([0.1] * 6 + [0.01] * 6)
