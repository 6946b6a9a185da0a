"""Sums over examples that are taken from a layer's inputs and output gradients, against the gradient rows."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sparsekit.curvature import RunningSum, gradient_rows, kronecker_factors, layer_gradients
from sparsekit.curvature import layers as module_of_layers
from sparsekit.errors import CurvatureError
from sparsekit.problem.likelihoods import Categorical
from sparsekit.problem.objective import Objective
from sparsekit.problem.parameters import ParameterSpace


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.a = nn.Embedding(6, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.a(self.embedding(x.argsort(1)).tanh()).mean(1)


class Own(nn.Module):
    """A weight without a rule."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return torch.tanh(x) @ self.weight.mT


NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "few positions": (lambda: nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)), (2, 9)),
    "many positions": (lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)), (12, 2)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2), nn.Conv2d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(6, 3)
        ),
        (2, 5, 5),
    ),
    "one row": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(20, 3)), (2, 5)),
    "a position each": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 3)),
        (4, 3, 3),
    ),
    "twice": (Twice, (4,)),
    "words": (Words, (6,)),
    "no rule": (Own, (4,)),
}


def objective(name, count=7, size=3):
    build, shape = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x, y = build().double(), torch.randn(count, *shape).double(), torch.randint(3, (count,))
    batches = list(zip(x.split(size), y.split(size), strict=True))
    return Objective(model, Categorical(), batches, ParameterSpace.of(model, include=("*",)))


def summed(objective, name, add):
    """What `add` adds up over the batches, and the gradients (N, *shape)."""
    total = RunningSum()
    for gradients in layer_gradients(objective, "empirical"):
        add(gradients[name], total)
    rows = torch.cat(list(gradient_rows(objective, "empirical")))
    info = objective.space[name]
    return total.value(), rows[:, info.slice].view(-1, *info.shape)


EVERY = [(n, info.name) for n in NETWORKS for info in objective(n).space.parameters]
MATRICES = [(n, name) for n, name in EVERY if len(objective(n).space[name].shape) > 1]


@pytest.mark.parametrize(("network", "name"), EVERY)
def test_squares_are_those_of_the_rows(network, name):
    found, G = summed(objective(network), name, lambda one, total: one.add_squares(total))
    assert_close(found, G.square().sum(0))


@pytest.mark.parametrize(("network", "name"), EVERY)
def test_squared_norms_are_those_of_the_rows(network, name):
    found, G = summed(objective(network), name, lambda one, total: one.add_squared_norms(total))
    assert_close(found, G.square().flatten(2).sum((0, 2)) if G.dim() > 2 else G.square().sum(0))


def seen(info, network):
    groups = 2 if (network, info.name) in (("convolutions", "1.weight"), ("a position each", "0.weight")) else 1
    return groups, info.shape[0] // groups, info.size // info.shape[0]


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize(("network", "name"), MATRICES)
def test_moments_are_those_of_the_rows(network, name, mode):
    given = objective(network)
    shape = seen(given.space[name], network)
    found, G = summed(given, name, lambda one, total: one.add_moments(shape, {mode: total}))
    G = G.reshape(-1, *shape)
    assert_close(found, torch.einsum("ngoi,ngpi->gop" if mode == 0 else "ngoi,ngoj->gij", G, G))


@pytest.mark.parametrize(("network", "name"), MATRICES)
def test_squares_in_a_basis_are_those_of_the_rows(network, name):
    given = objective(network)
    g, out, inner = shape = seen(given.space[name], network)
    draw = torch.Generator().manual_seed(1)
    U, V = (torch.randn(g, d, d, generator=draw, dtype=torch.float64) for d in (out, inner))
    for factors in ([U, V], [None, V], [U, None]):
        found, G = summed(given, name, lambda one, total, f=factors: one.add_squares_in_basis(shape, f, total))
        G = G.reshape(-1, *shape)
        G = G if factors[0] is None else torch.einsum("gop,ngoi->ngpi", U, G)
        G = G if factors[1] is None else torch.einsum("gij,ngoi->ngoj", V, G)
        assert_close(found, G.square().sum(0))


def test_moments_of_three_modes_are_those_of_the_rows():
    given = objective("convolutions")
    for mode, formula in enumerate(("noik,npik->op", "noik,nojk->ij", "noik,noil->kl")):
        add = lambda one, total, m=mode: one.add_moments((1, 4, 2, 9), {m: total})  # noqa: E731
        found, G = summed(given, "0.weight", add)
        G = G.reshape(-1, 4, 2, 9)
        assert_close(found[0], torch.einsum(formula, G, G))


@pytest.mark.parametrize(("network", "name"), EVERY)
def test_products_are_those_of_the_rows(network, name):
    given = objective(network)
    size = given.space[name].size
    V = torch.randn(size, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, G = summed(given, name, lambda one, total: total.add(one.product(V)))
    G = G.reshape(-1, size)
    assert_close(found, G.mT @ (G @ V))


@pytest.mark.parametrize("network", ["convolutions", "many positions", "no rule"])
def test_slices_of_one_example_give_the_same_sums(network, monkeypatch):
    given = objective(network)
    name = given.space.names[0]
    whole, _ = summed(given, name, lambda one, total: one.add_squares(total))
    monkeypatch.setattr(module_of_layers, "SLICE", 1)
    sliced, _ = summed(given, name, lambda one, total: one.add_squares(total))
    assert_close(sliced, whole)


def test_sums_of_many_batches_are_those_of_one():
    small, _ = summed(objective("linear", count=40, size=1), "0.weight", lambda one, total: one.add_squares(total))
    large, _ = summed(objective("linear", count=40, size=40), "0.weight", lambda one, total: one.add_squares(total))
    assert_close(small, large)


def test_a_running_sum_of_single_precision_keeps_double_precision_over_many_batches():
    total = RunningSum()
    for _ in range(4096):
        total.add(torch.full((1,), 1 + 2.0**-20))
    assert abs(float(total.value()) - 4096 * (1 + 2.0**-20)) < 1e-3  # 0.24 off if it were added up in float32


def test_a_running_sum_of_nothing_is_refused():
    with pytest.raises(ValueError, match="one batch at least"):
        RunningSum().value()


def test_a_mean_that_overflows_is_refused():
    total = RunningSum()
    total.add(torch.tensor([torch.inf]))
    with pytest.raises(CurvatureError, match="overflow"):
        total.mean(1)


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_kronecker_factors_of_one_example_give_its_own_block(name):
    given = objective("linear", count=1)
    factors = kronecker_factors(given, "empirical")[name]
    (row,) = torch.cat(list(gradient_rows(given, "empirical")))[:, given.space[name].slice]
    assert_close(torch.kron(factors.outputs[0], factors.inputs[0]), torch.outer(row, row))


def test_kronecker_factors_sum_over_positions_of_the_inputs_and_average_over_those_of_the_outputs():
    given = objective("convolutions")
    patches, d = [], []
    for inputs, targets in given.batches:
        output = given.model[0](inputs)
        loss = given.likelihood.losses(given.model[1:](output), targets).sum()
        patches.append(nn.functional.unfold(inputs, 3, stride=2))  # (b, in·k, T)
        d.append(torch.autograd.grad(loss, output)[0].flatten(2))
    patches, d = torch.cat(patches), torch.cat(d)
    factors = kronecker_factors(given, "empirical")["0.weight"]
    assert_close(factors.inputs[0], torch.einsum("nit,njt->ij", patches, patches) / 7)
    assert_close(factors.outputs[0], torch.einsum("not,npt->op", d, d) / 7 / 4)


def test_kronecker_factors_count_the_inputs_once_whatever_the_columns_of_the_output_curvature():
    given = objective("linear")
    exact, empirical = (kronecker_factors(given, kind)["0.weight"] for kind in ("exact", "empirical"))
    assert_close(exact.inputs, empirical.inputs)


def test_parameters_without_factors_have_no_kronecker_factors():
    assert set(kronecker_factors(objective("words"), "empirical")) == {"a.weight"}
