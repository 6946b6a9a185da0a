import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sparsekit import Categorical, Mask, Memory, ModelError, Objective, ParameterSpace, SettingsError, prune
from sparsekit.curvature import input_moments
from sparsekit.registry.registry import Registry
from sparsekit_obs.layerwise import LayerwiseSettings, LayerwiseSurgeon


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(24, 3)
    )


@pytest.fixture(scope="module")
def objective():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = network().double(), torch.randn(7, 2, 6, 6, dtype=torch.float64)
    inputs[:, 1] = 0  # half of the first layer's inputs are dead
    batches = [(x, torch.zeros(len(x), dtype=torch.long)) for x in inputs.split(3)]
    return Objective(model, Categorical(), batches, ParameterSpace.of(model))


def estimator(objective, **given):
    made = LayerwiseSurgeon(objective.space, LayerwiseSettings(**given))
    made.update(objective, generator=torch.Generator())
    return made


def hessian(objective, name):
    """Oracle: that of Σ_n ‖layer(x_n; W) − layer(x_n; W₀)‖² / N by automatic differentiation."""
    model = objective.model
    layer = model.get_submodule(name.rpartition(".")[0])
    seen = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    for inputs, _ in objective.batches:
        model(inputs)
    handle.remove()
    x = torch.cat(seen).detach()
    W = layer.weight.detach()

    def loss(w):
        out = torch.func.functional_call(layer, {"weight": w.view_as(W), "bias": layer.bias.detach()}, (x,))
        return (out - layer(x).detach()).square().sum() / len(x)

    return torch.func.hessian(loss)(W.flatten())


@pytest.mark.parametrize("name", ["0.weight", "2.weight", "4.weight"])
def test_the_precision_is_the_layers_own_hessian(objective, name):
    made = estimator(objective, damping=0.5, damping_scale="absolute").inverse()
    H = made.precision(torch.eye(objective.space.size, dtype=torch.float64))
    where = objective.space[name].slice
    truth = hessian(objective, name)
    added = torch.where(truth.diagonal() == 0, 0.5 * LayerwiseSurgeon.DEAD, 0.5)
    assert_close(H[where, where], truth + torch.diag(added))
    assert H[where].count_nonzero() == H[where, where].count_nonzero()


@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_large_damping_leaves_magnitude_in_each_layer(objective, scale):
    sigma = estimator(objective, damping=1e10, damping_scale=scale).inverse().operator.diagonal()
    for info in objective.space.parameters:
        live = sigma[info.slice].view(info.shape)[:, -1 if info.name != "0.weight" else 0].flatten()
        assert_close(live, live[:1].expand_as(live), rtol=1e-6, atol=0)


def test_dead_inputs_go_first(objective):
    info = objective.space["0.weight"]
    inverse = estimator(objective).inverse()
    scores = objective.space.read(objective.model).square() / inverse.diagonal()
    dead = torch.zeros(info.shape, dtype=torch.bool)
    dead[:, 1] = True
    assert scores[info.slice].view(info.shape)[dead].max() < scores[info.slice].view(info.shape)[~dead].min()


def test_joint_removal_is_least_squares_row_by_row(objective):
    weights = objective.space.read(objective.model)
    chosen = torch.rand(len(weights), generator=torch.Generator().manual_seed(3)) < 0.6
    inverse = estimator(objective, slice_mebibytes=1).inverse()
    delta = inverse.remove(weights, Mask.full(len(weights)), chosen).delta
    H = inverse.precision(torch.eye(len(weights), dtype=torch.float64))
    truth = torch.where(chosen, -weights, 0.0)
    truth[~chosen] = -torch.linalg.solve(H[~chosen][:, ~chosen], H[~chosen][:, chosen] @ truth[chosen])
    assert_close(delta, truth)


def test_moments_do_not_depend_on_the_batches(objective):
    whole = [(torch.cat([x for x, _ in objective.batches]), torch.cat([y for _, y in objective.batches]))]
    together = input_moments(Objective(objective.model, objective.likelihood, whole, objective.space))
    for name, moment in input_moments(objective).items():
        assert_close(moment, together[name])


def test_other_layers_are_refused_before_any_work():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 2))
    data = [(torch.randint(5, (6, 2)), torch.randint(2, (6,)))]
    given = {"name": "obs-layerwise", "examples": 6}
    with pytest.raises(ModelError, match=r"0\.weight belongs to none: exclude it"):
        prune(model, data, loss="categorical", estimator=given, pattern="uniform")
    pruned = prune(model, data, loss="categorical", estimator=given, pattern="uniform", sparsity=0.5, exclude=["0.*"])
    assert pruned.sparsity == 0.5


def test_a_pattern_that_compares_layers_is_refused():
    model, data = nn.Linear(4, 2), [(torch.randn(6, 4), torch.randint(2, (6,)))]
    with pytest.raises(SettingsError, match="compare within a layer only.*--pattern uniform"):
        prune(model, data, loss="categorical", estimator={"name": "obs-layerwise", "examples": 6})


def test_its_increase_is_not_taken_for_the_losss(objective):
    model, data = nn.Linear(4, 2), [(torch.randn(6, 4), torch.randint(2, (6,)))]
    given = {"name": "obs-layerwise", "examples": 6}
    done = prune(model, data, loss="categorical", estimator=given, pattern="uniform", sparsity=0.5)
    assert done.steps[0].predicted_increase != done.steps[0].predicted_increase  # not a number


def test_the_plugin_registers_it():
    from sparsekit.registry import builtins

    assert "obs-layerwise" in Registry(builtins).names("estimator")


def test_moments_are_taken_in_double_precision():
    model = nn.Sequential(nn.Linear(4, 3))
    inputs = 1 + 1e-3 * torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    objective = Objective(model, Categorical(), [(inputs, torch.zeros(500).long())], ParameterSpace.of(model))
    X = inputs.double()
    assert_close(input_moments(objective)["0.weight"][0], X.mT @ X / 500, rtol=1e-14, atol=0)


def test_patches_a_few_examples_at_a_time_change_nothing(objective, monkeypatch):
    whole = input_moments(objective)
    monkeypatch.setattr("sparsekit.curvature.inputs.PATCH_BYTES", 1)
    for name, moment in input_moments(objective).items():
        assert_close(moment, whole[name])


def test_groups_are_counted_before_anything_is_allocated():
    model = nn.Sequential(nn.Conv2d(640, 640, 5, groups=20))  # 20 Hessians of 800 × 800
    space, settings = ParameterSpace.of(model), LayerwiseSettings(slice_mebibytes=1)
    available = Memory(*[LayerwiseSurgeon.memory(space, settings)] * 2)
    with pytest.raises(SettingsError, match="'obs-layerwise' needs"):
        LayerwiseSurgeon.check(model, space, settings, available)
