import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sparsekit.curvature import GaussNewton, gradient_rows, per_example_gradients
from sparsekit.errors import CurvatureError
from sparsekit.problem.likelihoods import Bernoulli, Categorical, Gaussian
from sparsekit.problem.objective import Objective
from sparsekit.problem.parameters import ParameterSpace
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


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(torch.relu_(self.a(x).mul_(2)))


class Positional(nn.Module):
    """A layer that is called with a batch of one, whatever the number of examples."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x):
        return self.a(x) + self.b(x.new_ones(1, 2))


class Folded(nn.Module):
    """Positions folded into the first dimension; the last layer's first dimension is that of positions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x.reshape(-1, 2)))
        return self.b(h.view(*x.shape[:2], 4).transpose(0, 1)).mean(0)


class Functional(nn.Module):
    """Weights of layers that are used without calling them: always, and beside a call."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(nn.functional.linear(self.a(x), self.a.weight))
        return nn.functional.linear(h, self.b.weight, self.b.bias)


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        return self.a(input=x)


class Branching(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self):
        super().__init__()
        self.scale, self.a = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 3)

    def forward(self, x):
        rows = [row @ self.scale if row.sum() > 0 else row for row in x]
        return self.a(torch.stack(rows))


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


def norms():
    return nn.Sequential(
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.Flatten(2),
        nn.LayerNorm(9),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.LayerNorm(36, bias=False),
        nn.Linear(36, 3),
    )


class Words(nn.Module):
    """An embedding, tied to the layer that scores words."""

    def __init__(self, *, tied):
        super().__init__()
        self.embedding, self.a = nn.Embedding(6, 3, padding_idx=0), nn.Linear(3, 6, bias=False)
        if tied:
            self.a.weight = self.embedding.weight

    def forward(self, tokens):
        return self.a(torch.tanh(self.embedding(tokens)).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.b(self.a(x)[0][:, -1])


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "no bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "twice": (Twice, (4,)),
    "tied": (Tied, (4,)),
    "in place": (InPlace, (4,)),
    "positional": (Positional, (4,)),
    "folded": (Folded, (3, 2)),
    "functional": (Functional, (4,)),
    "keyword": (Keyword, (4,)),
    "sequence": (Sequence, (5, 2)),
    "conv": (conv, (2, 5, 5)),
    "grouped": (grouped, (4, 4, 4)),
    "conv1d": (conv1d, (2, 6)),
    "norms": (norms, (4, 3, 3)),
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


CONVOLUTIONS = {  # few channels: as convolutions; more channels than positions: as products with patches
    "plain": (nn.Conv2d, (3, 4, 3), {"padding": 1}),
    "strided": (nn.Conv2d, (3, 4, 3), {"stride": (2, 1), "padding": (0, 2)}),
    "pointwise": (nn.Conv2d, (3, 4, 1), {"stride": 2}),
    "dilated": (nn.Conv2d, (3, 4, (3, 2)), {"dilation": 2, "padding": 1}),
    "depthwise": (nn.Conv2d, (3, 6, 3), {"groups": 3}),
    "same, even": (nn.Conv2d, (4, 4, (2, 4)), {"padding": "same", "groups": 2}),
    "valid": (nn.Conv2d, (3, 4, 3), {"padding": "valid"}),
    "1d": (nn.Conv1d, (3, 4, 3), {"stride": 2, "padding": 1, "dilation": 2}),
    "1d same, even": (nn.Conv1d, (3, 4, 4), {"padding": "same"}),
    "patches": (nn.Conv2d, (3, 70, 3), {"padding": 1, "stride": (2, 1)}),
    "patches, grouped": (nn.Conv2d, (4, 100, 3), {"groups": 2, "dilation": 2, "padding": 2}),
    "patches, same, even": (nn.Conv2d, (3, 70, (2, 4)), {"padding": "same"}),
    "patches, 1d": (nn.Conv1d, (4, 20, 3), {"padding": 1, "groups": 2}),
    "patches, 1d same, even": (nn.Conv1d, (3, 20, 4), {"padding": "same"}),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_against_one_example_at_a_time(name, dtype):
    kind, args, kwargs = CONVOLUTIONS[name]
    model = made(lambda: nn.Sequential(kind(*args, **kwargs), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)))
    shape = (args[0], 6) if kind is nn.Conv1d else (args[0], 6, 7)
    draw = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(5, *shape, generator=draw, dtype=dtype), torch.randint(3, (5,), generator=draw)
    model.to(dtype)(inputs)
    problem = Objective(model, Categorical(), [(inputs, targets)], ParameterSpace.of(model, include="*"))
    (found,) = per_example_gradients(problem, "empirical")
    for i in range(5):
        loss = nn.functional.cross_entropy(model(inputs[i : i + 1]), targets[i : i + 1])
        expected = torch.autograd.grad(loss, list(model.parameters()))
        assert_close([found[n][i] for n, _ in model.named_parameters()], list(expected), rtol=1e-5, atol=1e-6)


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


def test_large_gradients_that_are_finite_are_given():
    model = made(lambda: nn.Linear(4, 3, bias=False)).float()
    nn.init.zeros_(model.weight)
    problem = Objective(
        model, Gaussian(1.0), [(torch.full((7, 4), 1e19), torch.full((7, 3), -1e19))], ParameterSpace.of(model)
    )
    (rows,) = gradient_rows(problem, "empirical")
    assert rows.isfinite().all() and not rows.sum().isfinite()


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.idle, self.dead = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        self.dead(x)
        return self.a(x)


def test_layers_without_influence_have_no_gradient():
    model = made(Skips)
    batch = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 3
    (found,) = per_example_gradients(Objective(model, Categorical(), [batch], ParameterSpace.of(model)), "empirical")
    assert {name for name, rows in found.items() if rows.any()} == {"a.weight"}


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings(tied):
    draw = torch.Generator().manual_seed(1)
    batches = [(torch.randint(6, (5, 4), generator=draw), torch.randint(6, (5,), generator=draw)) for _ in range(2)]
    model = made(lambda: Words(tied=tied))
    problem = Objective(model, Categorical(), batches, ParameterSpace.of(model))
    assert_close(second_moment(problem, fisher="exact"), dense_fisher(problem, "exact"))


@pytest.mark.parametrize("build", [Recurrent, Branching])
def test_models_that_cannot_be_vectorised(build):
    shape = (4, 2) if build is Recurrent else (4,)
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(5, *shape, generator=draw, dtype=torch.float64)
    model, targets = made(build), torch.arange(5) % 3
    problem = Objective(model, Categorical(), [(inputs, targets)], ParameterSpace.of(model, include="*"))
    (found,) = per_example_gradients(problem, "empirical")
    for i in range(5):
        loss = nn.functional.cross_entropy(model(inputs[i : i + 1]), targets[i : i + 1])
        expected = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        assert_close([found[n][i] for n, _ in model.named_parameters()], list(expected))


def calls(model, run):
    """How often the model is called on more than one example, and on one."""
    seen = []
    handle = model.register_forward_hook(lambda _m, args, _out: seen.append(len(args[0])))
    run()
    handle.remove()
    return sum(n > 1 for n in seen), sum(n == 1 for n in seen)


def test_rows_of_ordinary_layers_take_one_pass_a_batch():
    problem = objective("conv", count=9)
    many, single = calls(problem.model, lambda: list(gradient_rows(problem, "empirical")))
    assert (many, single) == (3, 2)  # the first batch's first and last example alone, to compare


def test_rows_are_the_callers_to_keep():
    problem = objective("conv")
    kept = list(gradient_rows(problem, "empirical"))
    assert_close(torch.cat(kept), torch.cat([rows.clone() for rows in gradient_rows(problem, "empirical")]))


@pytest.mark.parametrize("name", MODELS)
def test_gauss_newton_products(name):
    problem = objective(name)
    V = torch.randn(problem.space.size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert_close(GaussNewton(problem) @ V, dense_fisher(problem, "exact") @ V)
