import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekit.errors import CurvatureError, DataError
from sparsekit.methods.interfaces import FinetuneSettings
from sparsekit.problem.likelihoods import Categorical
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.pruning.finetune import finetune


@pytest.fixture
def problem(generator):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    inputs = torch.randn(64, 6, generator=generator)
    return model.eval(), [(inputs, inputs[:, :3].argmax(1))], ParameterSpace.of(model)


def train(problem, mask, **settings):
    model, batches, space = problem
    recipe = FinetuneSettings(epochs=30, learning_rate=0.1, **settings)
    return finetune(model, Categorical(), lambda: batches, space, mask, recipe, batches_per_epoch=1)


def test_removed_weights_stay_zero(problem):
    model, _, space = problem
    mask = Mask(torch.arange(space.size) % 3 == 0)
    mask.apply(space, model)
    train(problem, mask)
    assert (space.read(model)[mask.removed] == 0).all()
    assert (space.read(model)[mask.kept] != 0).all()


def test_a_removed_weight_that_is_not_zero_yet_becomes_zero(problem):
    model, _, space = problem
    mask = Mask(torch.arange(space.size) % 3 == 0)
    train(problem, mask)
    assert (space.read(model)[mask.removed] == 0).all()


def test_training_lowers_the_loss(problem):
    model, batches, space = problem
    inputs, targets = batches[0]
    before = nn.functional.cross_entropy(model(inputs), targets).item()
    train(problem, Mask.full(space.size))
    assert nn.functional.cross_entropy(model(inputs), targets).item() < 0.5 * before


def test_modes_and_gradients_are_as_they_were(problem):
    model, _, space = problem
    train(problem, Mask.full(space.size))
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_a_fraction_of_an_epoch_is_a_number_of_steps(problem):
    model, batches, space = problem
    recipe = FinetuneSettings(epochs=0.5)
    batches = batches * 10
    assert (
        finetune(model, Categorical(), lambda: batches, space, Mask.full(space.size), recipe, batches_per_epoch=10) == 5
    )


def test_a_loss_that_is_not_finite_is_an_error(problem):
    model, batches, space = problem
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(CurvatureError, match="lower finetune.learning_rate"):
        train(problem, Mask.full(space.size))


def test_the_callers_mode_of_gradients_does_not_matter(problem):
    _, _, space = problem
    with torch.no_grad():
        assert train(problem, Mask.full(space.size)) == 30


class Filled(TorchDispatchMode):
    """Notes where tensors that are filled by a mask lie, and their masks."""

    def __init__(self):
        super().__init__()
        self.devices = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.masked_fill_.Scalar:
            self.devices.add((args[0].device.type, args[1].device.type))
        return func(*args, **(kwargs or {}))


def test_a_mask_on_the_host_is_put_beside_the_model(problem, monkeypatch):
    model, _, space = problem
    model.to("meta")  # stands for a GPU; it has no values, so the loss is another one
    loss = torch.zeros(64, requires_grad=True)
    monkeypatch.setattr(Categorical, "losses", lambda self, output, target: loss)
    with Filled() as filled:
        train(problem, Mask.full(space.size))
    assert filled.devices == {("meta", "meta")}


def frozen(problem):
    """The problem in training mode, but for its batch norm."""
    model, _, _ = problem
    model.train()[1].eval()
    return model[1]


def test_batch_norm_in_evaluation_mode_keeps_its_statistics_where_the_model_is_in_training_mode(problem):
    norm = frozen(problem)
    before = norm.running_mean.clone()
    train(problem, Mask.full(problem[2].size))
    assert torch.equal(norm.running_mean, before)


def test_modes_are_as_they_were_where_they_differ(problem):
    norm = frozen(problem)
    train(problem, Mask.full(problem[2].size))
    assert problem[0].training and not norm.training


def test_batch_norm_is_trained_where_the_whole_model_is_in_evaluation_mode(problem):
    model, _, space = problem
    before = model[1].running_mean.clone()
    train(problem, Mask.full(space.size))
    assert not torch.equal(model[1].running_mean, before)


def test_an_epoch_without_batches_is_refused(problem):
    model, _, space = problem
    with pytest.raises(DataError, match="the data gave no batch"):
        train((model, [], space), Mask.full(space.size))


@pytest.mark.parametrize(
    ("decay", "rates"), [("constant", [0.1] * 4), ("stepwise", [0.1, 0.1, 0.01, 0.01]), ("cosine", None)]
)
def test_the_learning_rate_decays_as_told(problem, decay, rates, monkeypatch):
    model, batches, space = problem
    seen = []
    whole = torch.optim.SGD.step

    def step(self, *args, **kwargs):
        seen.append(self.param_groups[0]["lr"])
        return whole(self, *args, **kwargs)

    monkeypatch.setattr("torch.optim.SGD.step", step)
    settings = FinetuneSettings(epochs=4, learning_rate=0.1, decay=decay, decay_every=2)
    finetune(model, Categorical(), lambda: batches, space, Mask.full(space.size), settings, batches_per_epoch=1)
    assert seen == pytest.approx(rates or [0.1, 0.1 * 0.853553, 0.05, 0.1 * 0.146447], rel=1e-4)


def test_in_bfloat16_weights_stay_in_float32_and_removed_ones_zero(problem):
    model, batches, space = problem
    mask = Mask(torch.arange(space.size) % 3 == 0)
    mask.apply(space, model)
    seen = []
    model[3].register_forward_hook(lambda _, given, output: seen.append(output.dtype))
    train(problem, mask, precision="bfloat16")
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (space.read(model)[mask.removed] == 0).all()


def test_channels_last_changes_nothing_but_the_layout():
    def trained(**settings):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)).eval()
            batches = [(torch.randn(16, 2, 6, 6), torch.randint(3, (16,)))]
        train((model, batches, ParameterSpace.of(model)), Mask.full(ParameterSpace.of(model).size), **settings)
        return model

    plain, last = trained(), trained(channels_last=True)
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last[0].weight, plain[0].weight, rtol=1e-3, atol=1e-4)
