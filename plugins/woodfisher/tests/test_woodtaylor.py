import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sparsekit import Categorical, Mask, Objective, ParameterSpace, prune
from sparsekit_woodfisher.estimator import WoodFisher, WoodFisherSettings
from sparsekit_woodfisher.saliencies import WoodTaylor


@pytest.fixture(scope="module")
def context():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
        data = [(torch.randn(10, 3, dtype=torch.float64), torch.randint(2, (10,)))]
    objective = Objective(model, Categorical(), data, ParameterSpace.of(model))
    estimator = WoodFisher(objective.space, WoodFisherSettings(examples=10, damping=0.05, damping_scale="absolute"))
    estimator.update(objective, generator=torch.Generator())

    class Context:
        inverse, gradient = estimator.inverse(), objective.gradient()
        mask = Mask(torch.arange(20) % 6 != 2)
        weights = objective.space.read(model) * mask.kept

    return Context


def best_increase(H, g, fixed, values):
    """min gᵀδ + ½δᵀHδ with δ_C given."""
    S = ~fixed
    delta = torch.where(fixed, values, 0.0)
    delta[S] = -torch.linalg.solve(H[S][:, S], H[S][:, fixed] @ delta[fixed] + g[S])
    return float(g @ delta + 0.5 * delta @ H @ delta)


def test_the_score_is_the_cost_over_the_best_step_that_removes_nothing(context):
    scores = WoodTaylor(WoodTaylor.Settings()).score(context)
    H, g, w = torch.linalg.inv(context.inverse.operator.dense()), context.gradient, context.weights
    removed = context.mask.removed
    base = best_increase(H, g, removed, torch.zeros_like(w))
    for i in context.mask.kept.nonzero()[:, 0]:
        fixed = removed.clone()
        fixed[i] = True
        assert float(scores[i]) == pytest.approx(best_increase(H, g, fixed, -w) - base)
    assert (scores[removed] == 0).all()


def test_without_the_gradient_it_is_obs(context):
    scores = WoodTaylor(WoodTaylor.Settings(first_order=0)).score(context)
    kept = context.mask.kept
    assert_close(scores[kept], (context.weights.square() / (2 * context.inverse.diagonal(context.mask)))[kept])


def test_a_removal_with_the_gradient_lowers_the_models_loss_further(context):
    chosen = context.mask.kept & (torch.arange(20) % 3 == 0)
    w, g = context.weights, context.gradient
    plain = context.inverse.remove(w, context.mask, chosen)
    taylor = context.inverse.remove(w, context.mask, chosen, gradient=g)
    assert taylor.increase < plain.increase + float(g @ plain.delta)


@pytest.mark.parametrize("how", ["joint", "independent"])
def test_a_run_may_use_the_gradient(how):
    torch.manual_seed(0)
    model, data = nn.Linear(6, 3), [(torch.randn(40, 6), torch.randint(3, (40,)))]
    common = {"loss": "categorical", "sparsity": 0.5, "saliency": "woodtaylor", "exclude": ["bias"]}
    given = {"name": "woodfisher", "examples": 40, "damping": 0.5}
    without = prune(model, data, estimator=given, compensation=how, **common)
    using = prune(model, data, estimator=given, compensation={"how": how, "first_order": 1.0}, **common)
    assert using.steps[0].measured_increase < without.steps[0].measured_increase  # an untrained network: g matters


def test_the_score_conditions_once(context, monkeypatch):
    made = []
    conditioned = type(context.inverse).conditioned
    monkeypatch.setattr(
        type(context.inverse), "conditioned", lambda self, mask: made.append(mask) or conditioned(self, mask)
    )
    WoodTaylor(WoodTaylor.Settings()).score(context)
    assert len(made) == 1
