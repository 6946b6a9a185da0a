"""Weights that no gradient reaches are reported, and not counted."""

import json

import pytest
import torch
import torchvision
from torch import nn

import sparsekit
from sparsekit import Categorical, Objective, ParameterSpace
from sparsekit.cli.display import print_summary
from sparsekit.problem.unused import UNUSED, unused, used
from sparsekit.registry.installed import load_registry
from sparsekit.runs.run import execute
from sparsekit.runs.settings import resolve
from sparsekit.tasks import Digits


class WithHead(nn.Module):
    """An auxiliary head that runs in training mode only, as GoogLeNet's."""

    def __init__(self):
        super().__init__()
        self.first, self.head, self.last = nn.Linear(5, 8), nn.Linear(8, 50), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return (self.last(x), self.head(x)) if self.training else self.last(x)


class Routed(nn.Module):
    """Each batch goes to one of two experts, by the sign of its first input."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.never = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        return self.left(x) if x[0, 0] < 0 else self.right(x)


class Untold(nn.Module):
    """Takes no gradient at all, as quantised inference code does."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(5, 3), nn.Linear(5, 3)

    @torch.no_grad()
    def forward(self, x):
        return self.layer(x)


def data(examples=64):
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, 5, generator=draw)
    inputs[: examples // 2, 0], inputs[examples // 2 :, 0] = -1, 1
    labels = torch.randint(3, (examples,), generator=draw)
    return list(zip(inputs.split(examples // 2), labels.split(examples // 2), strict=True))


def objective(model):
    return Objective(model, Categorical(), data(), ParameterSpace.of(model))


def test_a_head_that_does_not_run_is_unused():
    assert unused(objective(WithHead())) == ["head.weight"]


def test_what_a_later_batch_reaches_is_used():
    assert unused(objective(Routed())) == ["never.weight"]


def test_where_no_gradient_can_be_taken_nothing_is_said_to_be_unused():
    assert unused(objective(Untold())) == []


def test_a_weight_of_dead_units_is_used():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].bias -= 100
    assert unused(objective(model)) == []


def test_the_model_is_left_as_it_was():
    model = WithHead()
    model.first.weight.requires_grad_(False)
    unused(Objective(model, Categorical(), data(), ParameterSpace.of(model, include=["*weight"])))
    assert model.training and not model.first.weight.requires_grad and model.last.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_space_without_a_tensor_is_that_of_a_model_without_it():
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Linear(2, 3), nn.Conv2d(4, 2, 1, groups=2))
    whole = ParameterSpace.of(model)
    rest = whole.without({"1.weight": "because"})
    assert rest == ParameterSpace.of(model, exclude=["1.weight"])
    assert [(i.layer, i.groups) for i in rest.parameters] == [(nn.Conv2d, 2)] * 2
    assert rest["2.weight"] == rest.parameters[1]
    assert (rest.total, rest.skipped["1.weight"]) == (whole.total, "because")
    assert whole.without({}) is whole


def test_the_sparsity_asked_for_is_that_of_the_network_that_runs():
    done = sparsekit.prune(WithHead(), data(), loss="categorical", estimator="obs", sparsity=0.5)
    assert sorted(done.mask) == ["first.weight", "last.weight"]
    assert sum(int((~kept).sum()) for kept in done.mask.values()) == 32
    assert done.skipped["head.weight"] == UNUSED
    assert bool((done.model.head.weight != 0).all())


def test_what_is_included_by_name_is_pruned_and_told_of():
    given = {"loss": "categorical", "estimator": "obs", "sparsity": 0.5, "include": ["*weight"]}
    with pytest.warns(sparsekit.DegradedWarning, match=r"no gradient reaches 'head.weight'"):
        done = sparsekit.prune(WithHead(), data(), **given)
    assert "head.weight" in done.mask
    assert done.degraded[0].startswith("no gradient reaches 'head.weight'")


class WithAux(nn.Module):
    """The digits' network, and a head beside it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.aux = inner, nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x)


@pytest.fixture
def with_aux(monkeypatch):
    network, model = Digits.network, Digits.model

    def wrapped(inner):
        made = WithAux(inner).eval()
        nn.init.ones_(made.aux.weight)
        nn.init.zeros_(made.aux.bias)
        return made

    plain = {"network": network}
    monkeypatch.setattr(Digits, "model", lambda self: wrapped(trained(self, model, plain)))
    monkeypatch.setattr(Digits, "network", lambda self: wrapped(network(self)))


def trained(task, model, plain):
    """The task's own network, trained without the head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Digits, "network", plain["network"])
        return model(task)


@pytest.mark.parametrize("included", [False, True])
def test_a_run_records_and_says_what_it_does_not_count(tmp_path, with_aux, included, capsys):
    raw = {"estimator": "obs", "sparsity": [0.5], "output": str(tmp_path), "tracking": {"enabled": False}}
    raw |= {"include": ["*weight"]} if included else {}
    outcome = execute(resolve(raw, load_registry()), load_registry())
    record = outcome.record
    print_summary(outcome)
    told = capsys.readouterr().out
    assert ("Not counted, as no gradient reaches them: aux.weight." in told) is not included
    assert ("degraded: no gradient reaches 'aux.weight'" in told) is included
    on_disk = json.loads(next(tmp_path.glob("*/record.json")).read_text())
    assert ("aux.weight" in record.levels[0].layer_sparsity) is included
    assert (on_disk["parameters"]["skipped"].get("aux.weight") == UNUSED) is not included
    assert any("no gradient reaches 'aux.weight'" in line for line in on_disk["degraded"]) is included


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_auxiliary_heads_of_googlenet_are_not_counted():
    model = torchvision.models.googlenet(weights=None, num_classes=4)
    given = [(torch.zeros(2, 3, 64, 64), torch.zeros(2, dtype=torch.long))]
    space, _ = used(Objective(model, Categorical(), given, ParameterSpace.of(model)), included=False)
    skipped = [name for name, why in space.skipped.items() if why == UNUSED]
    assert skipped and all(name.startswith(("aux1.", "aux2.")) for name in skipped)
    assert not [name for name in space.names if name.startswith("aux")]


def test_a_device_without_memory_says_so(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    model = WithHead()
    problem = Objective(model, Categorical(), data(), ParameterSpace.of(model))
    monkeypatch.setattr(torch.autograd, "grad", full)
    with pytest.raises(torch.OutOfMemoryError):
        unused(problem)


def test_an_estimator_without_examples_prunes_a_model_that_takes_no_empty_batch(tmp_path, monkeypatch):
    network = Digits.network

    def not_empty(module, args):
        assert len(args[0])

    def strict(self):
        model = network(self)
        model.register_forward_pre_hook(not_empty)
        return model

    monkeypatch.setattr(Digits, "network", strict)
    raw = {
        "estimator": "identity",
        "saliency": "magnitude",
        "compensation": "none",
        "sparsity": 0.5,
        "schedule": "one-shot",
        "finetune": {"epochs": 0},
        "output": str(tmp_path),
        "tracking": {"enabled": False},
    }
    outcome = execute(resolve(raw, load_registry()), load_registry())
    assert outcome.record.status == "finished"
