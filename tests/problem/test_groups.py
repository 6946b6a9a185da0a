"""Which weights lie side by side, against the products that layers compute."""

from math import prod

import pytest
import torch
from torch import nn

import sparsekit
from sparsekit.problem.groups import groups_of
from sparsekit.problem.parameters import ParameterSpace


class Conv1D(nn.Module):
    """Transformers' linear layer, whose weight is (in, out)."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


LAYERS = {
    "linear": (nn.Linear(8, 3, bias=False), (8,)),
    "conv": (nn.Conv2d(8, 3, (2, 3), bias=False), (8, 2, 3)),
    "conv in groups": (nn.Conv2d(8, 4, 2, groups=2, bias=False), (8, 2, 2)),
    "conv of one axis": (nn.Conv1d(4, 2, 3, bias=False), (4, 3)),
    "transposed": (nn.ConvTranspose2d(8, 3, (1, 2), bias=False), (8, 1, 1)),
    "transposed in groups": (nn.ConvTranspose2d(8, 4, 2, groups=2, bias=False), (8, 1, 1)),
    "transposed of one axis": (nn.ConvTranspose1d(4, 2, 2, bias=False), (4, 1)),
    "transformers": (Conv1D(3, 8), (8,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_group_is_of_one_output_and_of_neighbouring_input_channels(name):
    layer, shape = LAYERS[name]
    space = ParameterSpace.of(layer)
    places = prod(shape[1:])
    for group in groups_of(space, 4):
        acts = []  # of each weight: on which outputs, from which input channel, and from which place of it
        for i in group.tolist():
            with torch.no_grad():
                layer.weight.zero_().view(-1)[i] = 1.0
            jacobian = torch.autograd.functional.jacobian(layer, torch.zeros(1, *shape))
            outputs, inputs = jacobian.reshape(-1, prod(shape)).nonzero(as_tuple=True)
            acts.append((outputs.tolist(), {int(x) // places for x in inputs}, (inputs % places).tolist()))
        assert all((outputs, where) == (acts[0][0], acts[0][2]) for outputs, _, where in acts)
        first = min(acts[0][1])
        assert [channel for _, channel, _ in acts] == [{first + k} for k in range(4)]


@pytest.mark.parametrize("name", LAYERS)
def test_every_weight_is_in_one_group_where_sizes_divide(name):
    space = ParameterSpace.of(LAYERS[name][0])
    assert groups_of(space, 4).flatten().sort().values.tolist() == list(range(space.size))


def test_what_is_left_of_a_line_is_in_no_group():
    space = ParameterSpace.of(nn.Conv2d(6, 2, 3))
    index = groups_of(space, 4)
    assert len(index) == 2 * 9
    assert (index // 9 % 6 < 4).all()  # the last two channels are left


def test_a_depthwise_convolution_has_no_groups_along_its_inputs():
    assert len(groups_of(ParameterSpace.of(nn.Conv2d(8, 8, 4, groups=8)), 4)) == 0


def test_along_memory_neighbours_are_as_they_are_stored():
    space = ParameterSpace.of(nn.ConvTranspose2d(4, 2, 3))
    index = groups_of(space, 4, "memory")
    assert index[0].tolist() == [0, 1, 2, 3]
    assert len(index) == 4 * 4  # eighteen to an input: four groups, two are left


def test_parameters_of_less_than_two_dimensions_have_no_groups():
    model = nn.Linear(4, 8)
    model.scalar = nn.Parameter(torch.ones(()))
    space = ParameterSpace.of(model, include=["*"])
    assert len(groups_of(space, 4)) == len(groups_of(space, 4, "memory")) == 8


@pytest.mark.parametrize("saliency", ["obs", "obs-group"])
@pytest.mark.parametrize("estimator", ["fishleg", "diagonal", "mfac", "woodfisher", "obs"])
def test_two_of_four_input_channels_stay_whatever_the_estimator(estimator, saliency):
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(4, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 3)]
        model = nn.Sequential(*layers)
    data = [(torch.randn(32, 4, 6, 6, generator=draw), torch.randint(3, (32,), generator=draw))]
    given = {"estimator": estimator, "saliency": saliency, "pattern": "n:m", "sparsity": 0.5}
    done = sparsekit.prune(model, data, loss="categorical", **given)
    first, second, last = (done.model[i].weight.detach() for i in (0, 2, 4))
    for lines in (first.movedim(1, -1), second.movedim(0, -1), last):
        assert ((lines.reshape(-1, 4) != 0).sum(1) == 2).all()


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv1d(8, 8, 1), nn.ConvTranspose1d(8, 8, 1)])
def test_a_bias_has_no_group_of_inputs(layer):
    space = ParameterSpace.of(layer, include=["bias"])
    assert groups_of(space, 4, axis="inputs").numel() == 0
