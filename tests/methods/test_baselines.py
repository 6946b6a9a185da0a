"""The published estimators invert one matrix: on the same gradients they agree with one another and the recursion."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sparsekit import Categorical, Mask, Objective, ParameterSpace, ScoreContext
from sparsekit.methods.patterns import Unstructured
from sparsekit.registry import builtins
from sparsekit.registry.installed import load_registry
from sparsekit.registry.registry import Registry
from sparsekit.runs.preview import planned
from sparsekit.runs.settings import parse_assignment, resolve
from sparsekit.testing import dense_removal, dense_rows, exhaustive_removal, greedy_removal, rank_one_inverse

REGISTRY = Registry(builtins)
DAMPING = 1e-3


def network(examples, *layers):
    """An objective in float64 on weights alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(*layers).double()
        inputs = torch.randn(examples, model[0].in_features, dtype=torch.float64)
        targets = torch.randint(model[-1].out_features, (examples,))
    batches = list(zip(inputs.split(7), targets.split(7), strict=True))
    return Objective(model, Categorical(), batches, ParameterSpace.of(model))


def inverse(name, objective, **given):
    estimator = REGISTRY.get("estimator", name)
    settings = estimator.Settings(
        damping=DAMPING, damping_scale="absolute", fisher="empirical", examples=objective.count(), **given
    )
    made = estimator(objective.space, settings)
    made.update(objective, generator=torch.Generator())
    return made.inverse()


# 8 · 6 + 6 · 3 = 66 weights in blocks of 20
@pytest.mark.parametrize("examples", [3, 50], ids=["m << B", "m > B"])
@pytest.mark.parametrize("name", ["obs", "mfac", "woodfisher"])
def test_the_baselines_and_the_rank_one_recursion_agree(name, examples):
    objective = network(examples, nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    found = inverse(name, objective, block_size=20, across_layers=False).operator.dense()
    rows, truth, start = dense_rows(objective, "empirical"), torch.zeros(66, 66, dtype=torch.float64), 0
    for size in objective.space.stretches(20):
        where = slice(start, start + size)
        truth[where, where] = rank_one_inverse(rows[:, where], DAMPING)
        start += size
    assert_close(found, truth)


class Context(ScoreContext):
    def __init__(self, objective, inverse):
        self._weights, self._inverse = objective.space.read(objective.model), inverse

    weights = property(lambda self: self._weights)
    inverse = property(lambda self: self._inverse)
    mask = property(lambda self: Mask.full(len(self._weights)))
    units = gradient = generator = property(lambda self: pytest.fail("not needed"))


@pytest.fixture(params=[("obs", 4), ("obs", 40), ("mfac", 4)], ids=lambda given: f"{given[0]}, m = {given[1]}")
def twelve(request):
    """Twelve weights, Σ on all of them, and H from the gradients."""
    name, examples = request.param
    objective = network(examples, nn.Linear(3, 4, bias=False))
    rows = dense_rows(objective, "empirical")
    H = rows.mT @ rows / examples + DAMPING * torch.eye(12, dtype=torch.float64)
    return objective, inverse(name, objective, block_size=None), H


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_greedy_surgery_removes_what_a_search_one_by_one_does(twelve, count):
    objective, sigma, H = twelve
    context = Context(objective, sigma)
    surgeon = REGISTRY.get("saliency", "obs-greedy")
    scores = surgeon(surgeon.Settings(block_size=12)).score(context)
    chosen = Unstructured(None).choose(scores, context.mask, count, objective.space)
    order, increases = greedy_removal(H, context.weights, count)
    assert set(chosen.nonzero()[:, 0].tolist()) == set(order.tolist())
    removal = sigma.remove(context.weights, context.mask, chosen, "joint")
    assert removal.increase == pytest.approx(float(increases[-1]))
    delta, _ = dense_removal(H, context.weights, chosen, ~context.mask.kept, "joint")
    assert_close(removal.delta, delta, rtol=1e-5, atol=1e-6)


def test_the_first_weight_is_the_cheapest_of_all(twelve):
    objective, sigma, H = twelve
    weights = objective.space.read(objective.model)
    chosen, increase = exhaustive_removal(H, weights, 1)
    scores = weights.square() / (2 * sigma.diagonal())
    assert bool(chosen[scores.argmin()])
    assert float(scores.min()) == pytest.approx(increase)


def test_the_example_of_a_sparseml_recipe_makes_the_cuts_of_the_recipe():
    text = (Path(__file__).parents[2] / "docs" / "baselines.md").read_text()
    (assignment,) = re.findall(r'--set "(sparsity=\[.*\])"', text)
    raw = {"schedule": "one-shot", "estimator": "obs", "finetune": {"epochs": 4}}
    steps = planned(resolve(raw | parse_assignment(assignment), load_registry()))
    recipe = [0.7, *(0.9 - 0.2 * (1 - t / 6) ** 3 for t in range(1, 7))]
    assert [step.sparsity for step in steps] == pytest.approx(recipe, abs=1e-5)
    assert not any(step.restart for step in steps) and all(step.refresh and step.finetune for step in steps)
