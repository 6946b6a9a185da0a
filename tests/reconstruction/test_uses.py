import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from sparsekit.curvature.attention import plain_attention
from sparsekit.problem.parameters import ParameterSpace
from sparsekit.reconstruction.uses import Piece, WeightCalls


def calls(model, *inputs, space=None):
    found = []

    def seen(call, compute):
        output = compute()
        found.append((call, output.detach()))
        return output

    with torch.no_grad(), plain_attention(), WeightCalls(model, space or ParameterSpace.of(model), seen):
        model(*inputs)
    return found


def predicted(call, weight, bias, positions):
    X = call.inputs(positions)  # (g, rows, in)
    W = weight.reshape(call.groups, -1, call.width)
    b = torch.zeros(len(weight)) if bias is None else bias
    return X @ W.mT + b.view(call.groups, 1, -1)


LAYERS = {
    "linear": (nn.Linear(5, 4), (6, 5)),
    "linear on tokens": (nn.Linear(5, 4, bias=False), (6, 3, 5)),
    "convolution": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 6)),
    "oblong": (nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1)), (2, 2, 8, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding="same", groups=4), (2, 4, 5, 5)),
    "even kernel, same": (nn.Conv2d(2, 3, 2, padding="same"), (2, 2, 5, 5)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 5, 5)),
    "one axis": (nn.Conv1d(4, 6, 3, stride=2, padding=2, groups=2), (3, 4, 9)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("most", [None, 3])
def test_inputs_times_weight_are_the_outputs_at_the_same_positions(name, most):
    layer, shape = LAYERS[name]
    [(call, output)] = calls(layer, torch.randn(shape))
    positions = call.positions(most, shape[0], torch.Generator().manual_seed(0))
    expected = call.outputs(output, positions)
    assert_close(predicted(call, layer.weight, layer.bias, positions), expected)
    assert expected.shape[1] == call.rows(most, shape[0])


def test_positions_differ_from_example_to_example():
    [(call, _)] = calls(nn.Conv2d(1, 1, 3), torch.randn(8, 1, 12, 12))
    positions = call.positions(5, 8, torch.Generator().manual_seed(0))
    assert len({tuple(row.tolist()) for row in positions}) == 8
    assert all(len(set(row.tolist())) == 5 for row in positions)


@pytest.mark.parametrize("other", [False, True], ids=["of itself", "of another sequence"])
def test_attention_is_seen_through_its_packed_projections(other):
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    x, y = torch.randn(3, 5, 6), torch.randn(3, 4, 6)
    found = calls(attention, x, *((y, y) if other else (x, x)))
    whole = [Piece("in_proj_weight", 0, 18)]
    pieces = [Piece("in_proj_weight", 0, 6), Piece("in_proj_weight", 6, 18)]
    assert [call.weight for call, _ in found] == (pieces if other else whole) + [Piece("out_proj.weight", 0, 6)]
    assert [call.bias.name for call, _ in found] == ["in_proj_bias"] * (2 if other else 1) + ["out_proj.bias"]
    for call, output in found:
        weight, bias = (attention.get_parameter(p.name)[p.start : p.stop] for p in (call.weight, call.bias))
        assert_close(predicted(call, weight, bias, None), call.outputs(output))


class Functional(nn.Module):
    """A weight that is used twice, outside of its module and within, and one that is used in another way."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(F.linear(x, self.linear.weight)) @ self.other.weight


def test_weights_are_seen_wherever_they_are_used():
    found = [call for call, _ in calls(Functional(), torch.randn(2, 4))]
    assert [call.weight.name for call in found] == ["linear.weight", "linear.weight"]
    assert [call.bias and call.bias.name for call in found] == [None, "linear.bias"]


def others(model, *inputs):
    mode = WeightCalls(model, ParameterSpace.of(model))
    with torch.no_grad(), plain_attention(), mode:
        model(*inputs)
    return mode.others


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.embedding = nn.Linear(4, 4), nn.Embedding(5, 4)

    def forward(self, x):
        y = self.linear(self.embedding(x))
        return F.linear(F.linear(y, self.linear.weight.t()), self.embedding.weight)


def test_other_uses_of_a_weight_are_noted():
    assert others(Functional(), torch.randn(2, 4)) == {"other.weight": "matmul"}
    found = others(Transposed(), torch.randint(5, (2, 3)))
    assert found == {"linear.weight": "linear", "embedding.weight": "embedding"}


def test_ordinary_layers_and_attention_have_none():
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    assert others(layer, torch.randn(2, 3, 6)) == {}
    attention, x = nn.MultiheadAttention(6, 2, batch_first=True), torch.randn(2, 3, 6)
    assert others(attention, x, x + 1, x + 1) == {}
    assert others(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval(), torch.randn(2, 2, 4, 4)) == {}


def test_a_single_example_is_a_batch_of_one():
    layer = nn.Conv2d(2, 3, 3)
    [(call, output)] = calls(layer, torch.randn(2, 5, 5))
    assert_close(predicted(call, layer.weight, layer.bias, None), call.outputs(output))


def test_weights_outside_of_the_space_are_not():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    found = calls(model, torch.randn(2, 4), space=ParameterSpace.of(model, include=["1.weight"]))
    assert [call.weight.name for call, _ in found] == ["1.weight"]


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.other(F.relu(self.norm(self.conv(x))))


def test_a_normalisation_that_follows_directly_is_told_of():
    model, told = Normalised().eval(), []
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    mode = WeightCalls(model, ParameterSpace.of(model))
    mode.normed = lambda call, norm: told.append((call.weight.name, norm))
    z = torch.randn(2, 3, 4, 4)
    with torch.no_grad(), mode:
        model(torch.randn(2, 2, 6, 6))
    [(name, norm)] = told
    assert (name, norm.name) == ("conv.weight", "norm.bias")
    by_channel = [t.view(1, 3, 1, 1) for t in (norm.mean, norm.scale, norm.bias)]
    assert_close(by_channel[1] * (z - by_channel[0]) + by_channel[2], model.norm(z))


def test_a_normalisation_by_the_batch_is_not():
    model, told = Normalised().train(), []
    mode = WeightCalls(model, ParameterSpace.of(model))
    mode.normed = lambda call, norm: told.append(norm)
    with mode:
        model(torch.randn(2, 2, 6, 6))
    assert told == []
