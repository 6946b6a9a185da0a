import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sparsekit.curvature import GaussNewton, gradient_rows
from sparsekit.errors import CurvatureError
from sparsekit.likelihoods import Bernoulli, Categorical, Gaussian
from sparsekit.objective import Objective
from sparsekit.parameters import ParameterSpace
from sparsekit.testing import dense_fisher


def made(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        return model


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))[:, :3]


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)).mean(1))


def conv():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def grouped():
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2, dilation=2, padding="same"), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
    )


def conv1d():
    return nn.Sequential(nn.Conv1d(2, 3, 3, stride=2, padding=1, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "no bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "twice": (Twice, (4,)),
    "tied": (Tied, (4,)),
    "sequence": (Sequence, (5, 2)),
    "conv": (conv, (2, 5, 5)),
    "grouped": (grouped, (4, 4, 4)),
    "conv1d": (conv1d, (2, 6)),
}


def objective(name, likelihood=None, split=3, count=7, include=("*",)):
    likelihood = likelihood or Categorical()
    build, shape = MODELS[name]
    model = made(build)
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, *shape, generator=draw, dtype=torch.float64)
    if isinstance(likelihood, Categorical):
        targets = torch.randint(3, (count,), generator=draw)
    else:
        targets = torch.rand(count, 3, generator=draw, dtype=torch.float64).round()
    space = ParameterSpace.of(model, include=include)
    return Objective(model, likelihood, list(zip(inputs.split(split), targets.split(split), strict=True)), space)


def second_moment(objective, **kwargs):
    return sum(rows.mT @ rows for rows in gradient_rows(objective, **kwargs)) / objective.count()


@pytest.mark.parametrize("name", MODELS)
def test_exact_rows_give_the_gauss_newton_matrix(name):
    problem = objective(name)
    assert_close(second_moment(problem, fisher="exact"), dense_fisher(problem, "exact"))


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(0.7), Gaussian(0.5, "sum")], ids=lambda x: x.name)
def test_exact_rows_for_other_likelihoods(likelihood):
    problem = objective("mlp", likelihood)
    assert_close(second_moment(problem, fisher="exact"), dense_fisher(problem, "exact"))


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian(0.7)], ids=lambda x: x.name)
def test_empirical_rows_give_the_empirical_fisher(likelihood):
    problem = objective("mlp", likelihood)
    assert_close(second_moment(problem, fisher="empirical"), dense_fisher(problem, "empirical"))


@pytest.mark.parametrize("name", MODELS)
def test_empirical_rows_average_to_the_gradient(name):
    problem = objective(name)
    rows = torch.cat(list(gradient_rows(problem, "empirical")))
    assert_close(rows.mean(0), problem.gradient())


@pytest.mark.parametrize("fisher", ["importance", "sampled"])
def test_drawn_rows_have_the_gauss_newton_matrix_as_their_mean(fisher, generator):
    problem = objective("no bias", count=2, split=2)
    truth = dense_fisher(problem, "exact")
    mean = sum(second_moment(problem, fisher=fisher, generator=generator) for _ in range(3000)) / 3000
    assert (mean - truth).norm() < 0.05 * truth.norm()  # 1/√3000 ≈ 0.02 is one standard error


def test_importance_draws_scatter_less_than_sampled_labels(generator):
    problem = objective("no bias", count=2, split=2)
    with torch.no_grad():
        problem.model.weight *= 10  # a network that is sure of its answers
    truth = dense_fisher(problem, "exact")

    def scatter(fisher):
        draws = [second_moment(problem, fisher=fisher, generator=generator) - truth for _ in range(500)]
        return sum(float(d.square().sum()) for d in draws)

    assert scatter("importance") < 0.5 * scatter("sampled")


@pytest.mark.parametrize("split", [1, 4, 7])
def test_batch_splits_change_nothing(split):
    assert_close(
        second_moment(objective("conv", split=split), fisher="exact"), second_moment(objective("conv"), fisher="exact")
    )


def test_the_model_is_left_as_found(generator):
    problem = objective("conv")
    problem.model.train()
    problem.model[0].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in problem.model.state_dict().items()}
    list(gradient_rows(problem, generator=generator))
    assert problem.model.training and not problem.model[0].weight.requires_grad
    assert problem.model[3].weight.requires_grad and problem.model[3].weight.grad is None
    assert not problem.model[0]._forward_hooks
    assert all(torch.equal(before[k], v) for k, v in problem.model.state_dict().items())


def test_gradients_that_are_not_finite_are_refused(generator):
    problem = objective("mlp")
    with torch.no_grad():
        problem.model[0].weight[0, 0] = float("nan")
    with pytest.raises(CurvatureError, match="gradients of '0.weight' are not finite"):
        list(gradient_rows(problem, "empirical"))


@pytest.mark.parametrize("name", MODELS)
def test_gauss_newton_products(name):
    problem = objective(name)
    V = torch.randn(problem.space.size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert_close(GaussNewton(problem) @ V, dense_fisher(problem, "exact") @ V)
