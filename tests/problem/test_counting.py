"""Targets that do not count, classes with weights, smoothed and soft labels: everything as torch's own mean has it."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from sparsekit import Objective, ParameterSpace
from sparsekit.curvature import GaussNewton, gradient_rows
from sparsekit.methods.interfaces import FinetuneSettings, measure
from sparsekit.problem.likelihoods import as_likelihood
from sparsekit.problem.parameters import Mask
from sparsekit.pruning.finetune import finetune

N, C = 7, 4
WEIGHTS = torch.tensor([1.0, 0.2, 3.0, 0.05], dtype=torch.float64)
OPTIONS = [
    {},
    {"ignore_index": 2},
    {"label_smoothing": 0.1},
    {"weight": WEIGHTS},
    {"weight": WEIGHTS, "label_smoothing": 0.2, "ignore_index": 1},
]
LAYOUTS = [(7,), (3, 3, 1), (1,) * 7]
CASES = list(itertools.product(OPTIONS, [False, True], ["indices", "padded", "soft"], LAYOUTS))


class Net(nn.Module):
    """Two layers; with `positions` of three places each, else of one."""

    def __init__(self, positions):
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 5, 1), nn.Conv1d(5, C, 1)
        self.positions = positions

    def forward(self, x):
        out = self.second(torch.tanh(self.first(x)))
        return out if self.positions else out[..., 0]


def made(options, positions, labels, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net(positions).double()
    x = torch.randn(N, 3, 3 if positions else 1, generator=generator, dtype=torch.float64)
    shape = (N, 3) if positions else (N,)
    y = torch.randint(C, shape, generator=generator)
    y[0] = 0  # something counts under every option
    if labels == "padded":
        y = torch.where(torch.rand(shape, generator=generator) < 0.4, options.get("ignore_index", -100), y)
        y[-1] = options.get("ignore_index", -100)  # an example that is ignored whole
        y[0] = 0
    if labels == "soft":
        y = torch.randn(N, C, *shape[1:], generator=generator, dtype=torch.float64).softmax(1)
        options = {key: value for key, value in options.items() if key != "ignore_index"}
    loss = nn.CrossEntropyLoss(**options)
    batches = list(zip(x.split(layout), y.split(layout), strict=True))
    return Objective(model, as_likelihood(loss), batches, ParameterSpace.of(model)), loss, x, y


def oracle(objective, loss, x, y):
    """Loss, gradient and Gauss-Newton matrix of torch's own loss of all examples at once."""
    model, space = objective.model, objective.space
    values = {name: p.detach() for name, p in model.named_parameters() if name in space}

    def outputs(w):
        return torch.func.functional_call(model, space.unflatten(w), (x,))

    w = space.flatten(values)
    out = outputs(w)
    L = loss(out, y)
    gradient = torch.func.grad(lambda w: loss(outputs(w), y))(w)
    J = torch.func.jacrev(outputs)(w).reshape(out.numel(), -1)
    H = torch.func.hessian(lambda o: loss(o.view_as(out), y))(out.flatten())
    return L, gradient, J.mT @ H @ J


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("options", "positions", "labels", "layout"), CASES)
def test_loss_gradient_curvature_and_accuracy_are_those_of_torchs_mean(options, positions, labels, layout, seed):
    objective, loss, x, y = made(options, positions, labels, layout, seed)
    L, gradient, G = oracle(objective, loss, x, y)
    objective.check()
    assert_close(objective.loss(), float(L.detach()))
    assert_close(objective.gradient(), gradient)
    rows = torch.cat(list(gradient_rows(objective, "exact")))
    assert_close(rows.mT @ rows / N, G)
    assert_close(GaussNewton(objective) @ torch.eye(len(G), dtype=G.dtype), G)
    figures = measure(objective.model, objective.likelihood, objective.batches)
    assert_close(figures["loss"], float(L.detach()))
    truth = y.argmax(1) if labels == "soft" else y
    kept = truth != loss.ignore_index
    right = (objective.model(x).argmax(1) == truth)[kept].double().mean()
    assert_close(figures["accuracy"], float(right))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_empirical_rows_count_as_the_examples_do(options, positions, layout):
    objective, loss, x, y = made(options, positions, "padded", layout, 0)
    named = [p for name, p in objective.model.named_parameters() if name in objective.space]
    values = F.cross_entropy(objective.model(x), y, reduction="none", **options).view(N, -1)
    counts = torch.where(y == loss.ignore_index, 0.0, 1.0 if loss.weight is None else loss.weight[y.clamp_min(0)])
    z = counts.view(N, -1)
    c = z
    if loss.weight is not None:
        c = (1 - loss.label_smoothing) * z + loss.label_smoothing * loss.weight.mean() * (y != loss.ignore_index).view(
            N, -1
        )
    roots = torch.where(c > 0, values / c.clamp_min(1e-9).sqrt(), 0.0) * (N / z.sum()).sqrt()
    truth = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(row.sum(), named, retain_graph=True)]) for row in roots]
    )
    assert_close(torch.cat(list(gradient_rows(objective, "empirical"))), truth)


@pytest.mark.parametrize("kind", ["importance", "sampled"])
def test_drawn_rows_have_the_weighted_curvature_in_expectation(kind):
    objective, *_ = made(OPTIONS[-1], False, "padded", (7,), 1)
    exact = torch.cat(list(gradient_rows(objective, "exact")))
    repeated = [(x.repeat(1500, 1, 1), y.repeat(1500)) for x, y in objective.batches]
    many = Objective(objective.model, objective.likelihood, repeated, objective.space)
    rows = torch.cat(list(gradient_rows(many, kind, generator=torch.Generator().manual_seed(0))))
    truth = exact.mT @ exact / N
    assert float((rows.mT @ rows / len(rows) - truth).norm() / truth.norm()) < 0.1  # ~ 1/√1500 times a few


def test_without_ignored_targets_nothing_changes_in_the_last_digit():
    objective, *_ = made({}, True, "indices", (3, 3, 1), 0)
    values = (F.cross_entropy(objective.model(x), y, reduction="none").mean(1).sum() for x, y in objective.batches)
    assert objective.loss() == sum(float(value.detach()) for value in values) / N


@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(F.cross_entropy, weight=WEIGHTS),
        nn.NLLLoss(weight=WEIGHTS),
        functools.partial(F.nll_loss, weight=WEIGHTS, ignore_index=1),
    ],
    ids=["partial", "NLLLoss", "partial of nll_loss"],
)
def test_other_spellings_of_a_weighted_loss_are_the_same_number(loss):
    output = torch.randn(9, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(1)
    y = torch.arange(9) % C
    assert_close(as_likelihood(loss).losses(output, y).mean(), loss(output, y))


def test_fine_tuning_takes_torchs_mean_of_a_batch():
    objective, loss, x, y = made(OPTIONS[-1], True, "padded", (7,), 0)
    objective.model.zero_grad()
    (gradient,) = torch.autograd.grad(loss(objective.model(x), y), [objective.model.second.weight])
    truth = objective.model.second.weight.detach() - 0.1 * gradient
    settings = FinetuneSettings(epochs=1, learning_rate=0.1, momentum=0, weight_decay=0, decay="constant")
    finetune(
        objective.model,
        objective.likelihood,
        lambda: objective.batches,
        objective.space,
        Mask.full(objective.space.size),
        settings,
        batches_per_epoch=1,
    )
    assert_close(objective.model.second.weight.detach(), truth)
