from copy import deepcopy

import pytest
import torch
from torch import nn

import sparsekit
from sparsekit.errors import CurvatureError, DataError, ModelError, SettingsError, SparsekitError

FISHLEG = {"name": "fishleg", "examples": 64, "batch_size": 16}


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def data(generator):
    inputs = torch.randn(96, 6, generator=generator)
    return list(zip(inputs.split(32), inputs[:, :3].argmax(1).split(32), strict=True))


def test_a_users_own_model(model, data):
    pruned = sparsekit.prune(model, data, loss=nn.CrossEntropyLoss(), estimator=FISHLEG, sparsity=0.5)
    zeros = sum(int((dict(pruned.model.named_parameters())[name] == 0).sum()) for name in pruned.mask)
    assert zeros == 36
    assert pruned.sparsity == 0.5


def test_the_model_given_is_left_alone(model, data):
    before = deepcopy(model.state_dict())
    sparsekit.prune(model, data, loss="categorical", estimator=FISHLEG, sparsity=0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_result_is_a_plain_model(model, data):
    pruned = sparsekit.prune(model, data, loss="categorical", estimator=FISHLEG, sparsity=0.5).model
    assert list(pruned.state_dict()) == list(model.state_dict())
    assert list(deepcopy(pruned).state_dict()) == list(model.state_dict())


def test_in_place(model, data):
    assert (
        sparsekit.prune(model, data, loss="categorical", estimator=FISHLEG, sparsity=0.5, inplace=True).model is model
    )


def test_gradually_with_finetuning(model, data):
    pruned = sparsekit.prune(
        model,
        data,
        loss="categorical",
        estimator=FISHLEG,
        sparsity=0.8,
        schedule="cubic",
        steps=3,
        finetune={"epochs": 2},
    )
    assert len(pruned.steps) == 3
    assert pruned.steps[-1].finetuned is not None


def test_a_loss_without_distribution_needs_the_empirical_fisher(model, data):
    def loss(output, target):
        return nn.functional.cross_entropy(output, target, label_smoothing=0.1)

    with pytest.raises(SettingsError, match="set the estimator's fisher='empirical'"):
        sparsekit.prune(model, data, loss=loss, estimator=FISHLEG, sparsity=0.5)
    pruned = sparsekit.prune(model, data, loss=loss, estimator={**FISHLEG, "fisher": "empirical"}, sparsity=0.5)
    assert pruned.sparsity == 0.5


def test_names_choose_parameters(model, data):
    pruned = sparsekit.prune(model, data, loss="categorical", estimator=FISHLEG, sparsity=0.5, exclude=["0.*"])
    assert list(pruned.mask) == ["2.weight"]
    assert pruned.skipped["0.weight"] == "excluded by name"


def test_too_little_data(model, data):
    with pytest.raises(DataError, match="needs 1024 calibration examples, the data has 96"):
        sparsekit.prune(model, data, loss="categorical", estimator={"name": "fishleg", "examples": 1024})


def test_too_little_data_for_rows_of_several_examples(model, data):
    given = {"name": "obs", "examples": 128, "average": 10}
    with pytest.raises(SettingsError, match="average=10 must divide"):
        sparsekit.prune(model, data, loss="categorical", sparsity=0.5, estimator=given)
    with pytest.raises(DataError, match="the data has 96; give more data or set .*'examples': 90}"):
        sparsekit.prune(model, data, loss="categorical", sparsity=0.5, estimator={**given, "examples": 130})


def test_a_model_without_prunable_parameters(data):
    with pytest.raises(ModelError, match="has no parameters"):
        sparsekit.prune(nn.ReLU(), data, loss="categorical", estimator=FISHLEG)


def test_a_loss_that_is_nan(model, data):
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.raises(CurvatureError, match="not finite|NaN"):
        sparsekit.prune(model, data, loss="categorical", estimator=FISHLEG)


def refused(_model):
    pytest.fail("work was done before the data were looked at")


@pytest.mark.parametrize(
    "batch",
    [{"inputs": torch.ones(2, 6), "labels": torch.zeros(2)}, (torch.ones(2, 6),) * 3, torch.ones(2, 6)],
    ids=["dict", "three", "tensor"],
)
def test_batches_that_are_no_pairs_are_refused_before_any_work(model, batch):
    with pytest.raises(DataError, match=r"a pair of tensors \(inputs, targets\) was needed"):
        sparsekit.prune(model, [batch], loss="categorical", estimator=FISHLEG, evaluation=refused)


def test_an_output_that_is_no_tensor_is_refused_before_any_work(model, data):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return {"logits": self.inner(x)}

    with pytest.raises(ModelError, match="Packed returned type dict; one tensor was needed"):
        sparsekit.prune(Packed(), data, loss="categorical", estimator=FISHLEG, evaluation=refused)


def test_a_later_batch_that_is_no_pair_is_refused(model, data):
    with pytest.raises(DataError, match="a batch of type dict"):
        sparsekit.prune(model, [*data, {}], loss="categorical", estimator=FISHLEG)


def test_the_batch_size_of_finetuning_is_that_of_the_data(model, data):
    with pytest.raises(SettingsError, match="finetune.batch_size has no effect here.*leave it out"):
        sparsekit.prune(
            model, data, loss="categorical", estimator=FISHLEG, finetune={"epochs": 1, "batch_size": 8}, sparsity=0.5
        )


def test_a_sparsity_that_is_no_number(model, data):
    with pytest.raises(SettingsError, match="sparsity.0 = nan is not valid: input should be a finite number"):
        sparsekit.prune(model, data, loss="categorical", estimator=FISHLEG, sparsity=float("nan"))


@pytest.mark.parametrize("estimator", [FISHLEG, {**FISHLEG, "name": "obs"}], ids=lambda e: e["name"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_the_callers_mode_of_gradients_does_not_matter(model, data, estimator, mode):
    def pruned():
        out = sparsekit.prune(
            model,
            data,
            loss="categorical",
            estimator=estimator,
            sparsity=0.5,
            finetune={"epochs": 1},
            compensation={"how": "joint", "first_order": 1.0},
        )
        return [parameter.detach() for parameter in out.model.parameters()]

    with mode():
        inside = pruned()
    assert all(torch.equal(a, b) for a, b in zip(inside, pruned(), strict=True))


def test_a_frozen_layer_is_left_alone(model, data):
    model[0].requires_grad_(False)
    pruned = sparsekit.prune(model, data, loss="categorical", estimator=FISHLEG, sparsity=0.5)
    assert list(pruned.mask) == ["2.weight"]
    assert pruned.skipped["0.weight"] == "frozen (requires_grad=False)"


def test_what_reconstruction_cannot_do_is_said_before_the_model_is_touched(model, data):
    before = deepcopy(model.state_dict())
    given = {"loss": "categorical", "estimator": FISHLEG, "inplace": True}
    with pytest.raises(DataError, match="reconstruction needs 1024 .*set reconstruct="):
        sparsekit.prune(model, data, **given, reconstruct={"how": "layerwise", "examples": 1024})
    with pytest.raises(SettingsError, match="without ridge has 6 equations for 7 unknowns"):
        sparsekit.prune(model, data, **given, reconstruct={"how": "layerwise", "examples": 6, "ridge": 0})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_reconstruction_of_a_users_own_model(model, data):
    given = {"loss": "categorical", "estimator": FISHLEG, "compensation": "none"}
    plain = sparsekit.prune(model, data, **given)
    fitted = sparsekit.prune(model, data, **given, reconstruct={"how": "fisher", "examples": 96})
    assert all(fit.error_after < fit.error_before for fit in fitted.steps[0].reconstruction.layers)
    assert fitted.steps[0].measured_increase == plain.steps[0].measured_increase
    assert fitted.sparsity == plain.sparsity


def test_the_weighting_takes_the_estimators_kind_of_fisher(model, data):
    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1)

    given = {"estimator": {"name": "diagonal", "examples": 64, "fisher": "empirical"}, "sparsity": 0.5}
    done = sparsekit.prune(model, data, loss=loss, **given, reconstruct={"how": "fisher", "examples": 96})
    assert len(done.steps[0].reconstruction.layers) == 2


class Casts(nn.Module):
    """Casts inside, as users of autocast have it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.layer(x)


def some_data(examples=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, 12, generator=generator)
    return [(x, torch.randint(3, (examples,), generator=generator))]


def test_autocast_inside_the_model_works():
    pruned = sparsekit.prune(Casts(), some_data(), loss="categorical", estimator="obs", sparsity=0.5)
    assert pruned.sparsity == 0.5


def test_autocast_around_the_call_changes_nothing():
    model = nn.Linear(12, 3)
    plain = sparsekit.prune(model, some_data(), loss="categorical", estimator="obs")
    with torch.autocast("cpu", torch.bfloat16):
        inside = sparsekit.prune(model, some_data(), loss="categorical", estimator="obs")
    assert inside.steps[-1].pruned == plain.steps[-1].pruned != plain.dense


def test_as_many_examples_as_there_are_where_nobody_said_how_many():
    pruned = sparsekit.prune(nn.Linear(12, 3), some_data(100), loss="categorical", estimator="obs")
    assert pruned.steps[-1].curvature["examples"] == 100
    with pytest.raises(SparsekitError, match="needs 101 calibration examples"):
        estimator = {"name": "obs", "examples": 101}
        sparsekit.prune(nn.Linear(12, 3), some_data(100), loss="categorical", estimator=estimator)


@pytest.mark.parametrize(
    "loss, place, message",
    [
        (nn.NLLLoss(), "weights", "outputs contain NaN"),
        (nn.CrossEntropyLoss(), "inputs", "inputs of the data's first batch contain NaN"),
        (nn.HuberLoss(), "targets", "targets of the data's first batch contain NaN"),
    ],
)
def test_nan_is_refused_where_it_is_first(model, data, loss, place, message):
    inputs, targets = next(iter(data))
    inputs = inputs.clone()
    if place == "weights":
        next(model.parameters()).data.view(-1)[0] = torch.nan
    elif place == "inputs":
        inputs.view(-1)[0] = torch.nan
    else:
        targets = torch.full_like(model(inputs).detach(), torch.nan)
    with pytest.raises(SparsekitError, match=message):
        sparsekit.prune(model, [(inputs, targets)], loss=loss, estimator={"name": "fishleg", "fisher": "empirical"})


def test_what_is_no_module_is_refused(data):
    with pytest.raises(SparsekitError, match=r"the model is of type str; a torch.nn.Module was needed"):
        sparsekit.prune("resnet50", data, loss="categorical")


@pytest.mark.parametrize("given", [0.5, {"accuracy": "high"}, None])
def test_an_evaluation_that_gives_no_numbers_is_refused(model, data, given):
    with pytest.raises(SparsekitError, match="`evaluation` returned .* numbers by name were needed"):
        sparsekit.prune(model, data, loss="categorical", evaluation=lambda network: given)


def test_a_single_example_is_too_little_data(model, data):
    inputs, targets = next(iter(data))
    with pytest.raises(SparsekitError, match="needs 1024 calibration examples, the data has 1"):
        sparsekit.prune(model, [(inputs[:1], targets[:1])], loss="categorical")
