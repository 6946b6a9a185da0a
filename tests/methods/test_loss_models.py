import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.testing import assert_close

from sparsekit import Categorical, CompensationSettings, InverseFisher, Mask, Objective, ParameterSpace, prune
from sparsekit.linalg import Diagonal
from sparsekit.methods.loss_models import LinearModel, OptimalBrainDamage, QuadraticModel
from sparsekit.methods.patterns import Unstructured
from sparsekit.methods.saliencies import OptimalBrainSurgeon
from sparsekit.pruning.cut import Surgeon
from sparsekit.testing import dense_fisher
from sparsekit_woodfisher.saliencies import WoodTaylor

MODELS = {
    "linear-model": LinearModel,
    "quadratic-model": QuadraticModel,
    "obd": OptimalBrainDamage,
    "obs": OptimalBrainSurgeon,
    "woodtaylor": WoodTaylor,
}


@pytest.fixture(scope="module")
def objective():
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    inputs = torch.randn(40, 5, generator=draw, dtype=torch.float64)
    targets = torch.randint(3, (40,), generator=draw)
    space = ParameterSpace.of(model)
    with torch.no_grad():  # weights removed before, and ties
        w = space.read(model)
        w[3] = w[17] = 0.0
        w[5], w[6] = 0.25, -0.25
        space.write(model, w)
    return Objective(model, Categorical(), list(zip(inputs.split(8), targets.split(8), strict=True)), space)


@pytest.fixture(scope="module")
def kept(objective):
    kept = torch.ones(objective.space.size, dtype=torch.bool)
    kept[3] = kept[17] = False
    return kept


def reference(name, objective, kept, penalty, damping=0.1):
    """The formulas, an element at a time, from dense matrices."""
    w, g = objective.space.read(objective.model).tolist(), plain_gradient(objective).tolist()
    F = dense_fisher(objective, "exact")
    h = F.diagonal().tolist()
    sigma = (1 / (F.diagonal() + damping)).tolist()
    scores = []
    for k in range(len(w)):
        own = {
            "linear-model": abs(-g[k] * w[k]),
            "quadratic-model": abs(-g[k] * w[k] + 0.5 * h[k] * w[k] ** 2),
            "obd": 0.5 * h[k] * w[k] ** 2,
            "obs": w[k] ** 2 / (2 * sigma[k]),
            "woodtaylor": (w[k] - sigma[k] * g[k]) ** 2 / (2 * sigma[k]),
        }[name]
        scores.append(own + penalty / 2 * w[k] ** 2 if bool(kept[k]) else 0.0)
    return torch.tensor(scores, dtype=torch.float64)


def plain_gradient(objective):
    inputs, targets = (torch.cat(parts) for parts in zip(*objective.batches, strict=True))
    tensors = objective.space.tensors(objective.model)
    for t in tensors.values():
        t.requires_grad_(True)
    loss = nn.functional.cross_entropy(objective.model(inputs), targets)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(tensors.values()))])


class Recorder(Unstructured):
    def choose(self, scores, mask, count, space):
        self.scores = scores
        return super().choose(scores, mask, count, space)


def cut(saliency, objective, kept, sparsity=0.5, damping=0.1):
    inverse = InverseFisher(Diagonal(1 / (dense_fisher(objective, "exact").diagonal() + damping)), damping)
    pattern = Recorder(Unstructured.Settings(floor=0))
    surgeon = Surgeon(saliency, pattern, CompensationSettings(how="none"))
    w = objective.space.read(objective.model)
    removal, _, expected = surgeon.remove(w, Mask(kept), sparsity, inverse, objective, torch.Generator().manual_seed(0))
    return pattern.scores, removal.delta, expected


@pytest.mark.parametrize("penalty", [0.0, 1e-3, 10.0])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_formulas_element_by_element(name, penalty, objective, kept):
    saliency = MODELS[name](MODELS[name].Settings(penalty=penalty))
    assert_close(cut(saliency, objective, kept)[0], reference(name, objective, kept, penalty))


@pytest.mark.parametrize("name", MODELS)
def test_equal_scores_are_taken_by_index(name, objective, kept):
    """Two weights of one size in one row of a layer whose inputs are alike."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    x = torch.tensor([[1.0, 1.0], [-2.0, -2.0]], dtype=torch.float64)
    tied = Objective(model, Categorical(), [(x, torch.tensor([0, 1]))], ParameterSpace({"0.weight": (1, 2)}))
    scores, delta, _ = cut(MODELS[name](MODELS[name].Settings()), tied, torch.ones(2, dtype=torch.bool))
    assert scores[0] == scores[1]
    assert delta[0] != 0
    assert delta[1] == 0


def test_brain_damage_is_the_surgeon_on_a_diagonal_whose_damping_is_the_penalty(objective, kept):
    surgeon, _, _ = cut(OptimalBrainSurgeon(None), objective, kept, damping=0.3)
    damage, _, _ = cut(OptimalBrainDamage(OptimalBrainDamage.Settings(penalty=0.3)), objective, kept)
    assert_close(surgeon, damage)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("linear-model", lambda g, h, d: g @ d),
        ("quadratic-model", lambda g, h, d: g @ d + 0.5 * h @ d.square()),
        ("obd", lambda g, h, d: 0.5 * h @ d.square()),
    ],
)
def test_each_model_predicts_the_cut_by_its_own_terms(name, formula, objective, kept):
    _, delta, expected = cut(MODELS[name](MODELS[name].Settings(penalty=1.0)), objective, kept)
    h = dense_fisher(objective, "exact").diagonal()
    assert expected == pytest.approx(float(formula(plain_gradient(objective), h, delta)))


def test_the_sampled_diagonal_is_right_on_average(objective, kept):
    w = objective.space.read(objective.model)
    exact = reference("obd", objective, kept, 0.0)
    surgeon = Surgeon(
        OptimalBrainDamage(OptimalBrainDamage.Settings(curvature="sampled")),
        pattern := Recorder(Unstructured.Settings(floor=0)),
        CompensationSettings(how="none"),
    )
    total = torch.zeros_like(w)
    for seed in range(200):
        draw = torch.Generator().manual_seed(seed)
        surgeon.remove(w, Mask(kept), 0.5, InverseFisher(Diagonal(torch.ones_like(w)), 0.1), objective, draw)
        total += pattern.scores
    assert_close(total / 200, exact, rtol=0.25, atol=float(exact.max()) * 0.02)


def test_a_negative_penalty_is_refused():
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        QuadraticModel.Settings(penalty=-1.0)


@pytest.mark.parametrize("saliency", ["linear-model", "quadratic-model", "obd"])
def test_a_record_tells_the_models_prediction(saliency, objective):
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    data = [(x.float(), t) for x, t in objective.batches]
    done = prune(
        model, data, loss="categorical", estimator="identity", saliency=saliency, sparsity=0.5, schedule="one-shot"
    )
    assert done.steps[-1].predicted_increase == done.steps[-1].predicted_increase  # no NaN
