import pytest
import torch
from torch import nn

from sparsekit.errors import CurvatureError, DataError, ModelError
from sparsekit.methods.interfaces import FinetuneSettings, measure
from sparsekit.problem.likelihoods import Categorical
from sparsekit.problem.objective import Objective, as_found
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.pruning.finetune import finetune

X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0])

BATCHES = [
    pytest.param({"inputs": X, "labels": Y}, "a batch of type dict", id="dict"),
    pytest.param((X, Y, Y), r"a batch of tuple \(Tensor, Tensor, Tensor\)", id="three"),
    pytest.param(X, "a batch of type Tensor", id="tensor"),
    pytest.param(X[:2], "a batch of type Tensor", id="tensor of two rows"),
    pytest.param(((X, X), Y), r"a batch of tuple \(tuple, Tensor\)", id="tuple of inputs"),
    pytest.param([{"x": X}, Y], r"a batch of list \(dict, Tensor\)", id="dict of inputs"),
    pytest.param((X, 3), r"a batch of tuple \(Tensor, int\)", id="number"),
    pytest.param((X, Y[:3]), r"inputs \(4, 3\) and targets \(3,\); as many rows", id="fewer targets"),
    pytest.param((X[0, 0], Y), r"inputs \(\) and targets \(4,\)", id="no rows"),
]


class Outputs(nn.Module):
    """A linear layer whose output is packed by `pack`."""

    def __init__(self, pack):
        super().__init__()
        self.layer, self.pack = nn.Linear(3, 2), pack

    def forward(self, x):
        return self.pack(self.layer(x))


def objective(batches, model=None):
    model = model or nn.Linear(3, 2)
    return Objective(model, Categorical(), batches, ParameterSpace.of(model))


def tune(model, batches):
    space = ParameterSpace.of(model)
    recipe = FinetuneSettings(epochs=1)
    finetune(model, Categorical(), lambda: batches, space, Mask.full(space.size), recipe, batches_per_epoch=1)


@pytest.mark.parametrize(("batch", "message"), BATCHES)
def test_a_batch_that_is_no_pair_of_tensors_is_refused(batch, message):
    with pytest.raises(DataError, match=message):
        objective([batch]).loss()


def test_examples_are_counted_in_pairs_of_tensors_alone():
    with pytest.raises(DataError, match="a batch of type dict"):
        objective([{"inputs": X, "labels": Y}]).count()


def test_a_list_of_two_tensors_is_a_batch():
    assert objective([[X, Y]]).loss() > 0


def test_measuring_refuses_what_is_no_pair_of_tensors():
    with pytest.raises(DataError, match="a pair of tensors"):
        measure(nn.Linear(3, 2), Categorical(), [{"inputs": X, "labels": Y}])


def test_fine_tuning_refuses_what_is_no_pair_of_tensors():
    with pytest.raises(DataError, match="a pair of tensors"):
        tune(nn.Linear(3, 2), [(X, Y, Y)])


OUTPUTS = [
    pytest.param(lambda z: (z, z), r"Outputs returned tuple \(Tensor, Tensor\)", id="tuple"),
    pytest.param(lambda z: {"logits": z}, "Outputs returned type dict", id="dict"),
]


@pytest.mark.parametrize(("pack", "message"), OUTPUTS)
@pytest.mark.parametrize(
    "use",
    [
        lambda model: objective([(X, Y)], model).loss(),
        lambda model: objective([(X, Y)], model).check(),
        lambda model: measure(model, Categorical(), [(X, Y)]),
        lambda model: tune(model, [(X, Y)]),
    ],
    ids=["loss", "check", "measure", "finetune"],
)
def test_an_output_that_is_no_tensor_is_refused(use, pack, message):
    with pytest.raises(ModelError, match=message):
        use(Outputs(pack))


def test_the_model_may_return_what_it_likes_afterwards():
    model = Outputs(lambda z: (z, z))
    with as_found(model):
        pass
    assert len(model(X)) == 2


def test_the_gradient_does_not_depend_on_the_callers_mode():
    problem = objective([(X, Y)])
    with torch.no_grad():
        inside = problem.gradient()
    assert torch.equal(inside, problem.gradient())


def test_a_loss_that_is_not_finite_is_refused_at_once():
    with pytest.raises(CurvatureError, match="outputs contain NaN, though its inputs have none"):
        objective([(X * torch.inf, Y)]).check()


class Counts(nn.Module):
    """Counts its calls in a buffer, in place and anew."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = self.last + 1
        return self.layer(x)


def test_buffers_are_as_they_were():
    model = Counts()
    Objective(model, Categorical(), [(torch.randn(6, 4), torch.zeros(6).long())], ParameterSpace.of(model)).loss()
    assert float(model.calls) == float(model.last) == 0
