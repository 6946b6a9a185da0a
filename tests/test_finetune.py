import pytest
import torch
from torch import nn

from sparsekit.errors import CurvatureError
from sparsekit.finetune import finetune
from sparsekit.interfaces import FinetuneSettings
from sparsekit.likelihoods import Categorical
from sparsekit.parameters import Mask, ParameterSpace


@pytest.fixture
def problem(generator):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    inputs = torch.randn(64, 6, generator=generator)
    return model.eval(), [(inputs, inputs[:, :3].argmax(1))], ParameterSpace.of(model)


def train(problem, mask, **settings):
    model, batches, space = problem
    recipe = FinetuneSettings(epochs=30, learning_rate=0.1, **settings)
    return finetune(model, Categorical(), lambda: batches, space, mask, recipe, batches_per_epoch=1)


def test_removed_weights_stay_zero(problem):
    model, _, space = problem
    mask = Mask(torch.arange(space.size) % 3 == 0)
    mask.apply(space, model)
    train(problem, mask)
    assert (space.read(model)[mask.removed] == 0).all()
    assert (space.read(model)[mask.kept] != 0).all()


def test_a_removed_weight_that_is_not_zero_yet_becomes_zero(problem):
    model, _, space = problem
    mask = Mask(torch.arange(space.size) % 3 == 0)
    train(problem, mask)
    assert (space.read(model)[mask.removed] == 0).all()


def test_training_lowers_the_loss(problem):
    model, batches, space = problem
    inputs, targets = batches[0]
    before = nn.functional.cross_entropy(model(inputs), targets).item()
    train(problem, Mask.full(space.size))
    assert nn.functional.cross_entropy(model(inputs), targets).item() < 0.5 * before


def test_modes_and_gradients_are_as_they_were(problem):
    model, _, space = problem
    train(problem, Mask.full(space.size))
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_a_fraction_of_an_epoch_is_a_number_of_steps(problem):
    model, batches, space = problem
    recipe = FinetuneSettings(epochs=0.5)
    batches = batches * 10
    assert (
        finetune(model, Categorical(), lambda: batches, space, Mask.full(space.size), recipe, batches_per_epoch=10) == 5
    )


def test_a_loss_that_is_not_finite_is_an_error(problem):
    model, batches, space = problem
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(CurvatureError, match="lower finetune.learning_rate"):
        train(problem, Mask.full(space.size))


def test_the_callers_mode_of_gradients_does_not_matter(problem):
    _, _, space = problem
    with torch.no_grad():
        assert train(problem, Mask.full(space.size)) == 30


def test_a_norm_in_evaluation_mode_inside_a_model_in_training_mode_stays_frozen():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)).train()
    model[1].eval()
    space = ParameterSpace.of(model)
    data = [(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(8).long())]
    finetune(
        model,
        Categorical(),
        lambda: data,
        space,
        Mask.full(space.size),
        FinetuneSettings(epochs=1),
        batches_per_epoch=1,
    )
    assert not model[1].training and float(model[1].running_mean.abs().max()) == 0
    assert float(model[2].running_mean.abs().max()) > 0
