"""A network that computes nothing any more says so."""

import pytest
import torch
from torch import nn

import sparsekit
from sparsekit import DegradedWarning
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.pruning.collapse import constant_outputs, emptied, silenced

SPACE = ParameterSpace({"a": (2, 2), "b": (1, 3)})
FLOORLESS = {"name": "unstructured", "floor": 0}


def mask(*removed):
    kept = torch.ones(SPACE.size, dtype=torch.bool)
    kept[list(removed)] = False
    return Mask(kept)


def data():
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 5, generator=draw)
    return [(inputs, (inputs[:, 0] > 0).long())]


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 2))
    with torch.no_grad():
        model[2].weight *= 1e-3  # the smallest go first
    return model


def test_a_tensor_is_named_by_the_cut_that_takes_its_last_weight():
    [line] = emptied(SPACE, mask(4), mask(4, 5, 6))
    assert line.startswith("all 3 weights of 'b' are removed")
    assert not emptied(SPACE, mask(), mask(4, 5))
    assert not emptied(SPACE, mask(4, 5, 6), mask(0, 4, 5, 6))  # it was said before


def test_a_path_that_is_cut_although_every_layer_has_weights_makes_outputs_constant():
    model = nn.Sequential(nn.Linear(5, 2), nn.ReLU(), nn.Linear(2, 3))
    with torch.no_grad():
        model[0].weight[0] = 0  # the first unit has no input,
        model[2].weight[:, 1] = 0  # and nobody reads the second
    assert constant_outputs(model, data()).all()


def test_outputs_that_vary_are_not_constant():
    assert not constant_outputs(network(), data()).any()


def test_of_one_example_nothing_can_be_told():
    assert not len(constant_outputs(network(), [(torch.ones(1, 5), torch.zeros(1))]))
    assert not len(constant_outputs(network(), []))


def test_more_than_half_of_the_outputs_are_worth_a_word_once():
    none, half, most, every = (torch.arange(4) < k for k in (0, 2, 3, 4))
    assert not silenced(none, half)
    assert silenced(none, most)[0].startswith("3 of the network's 4 outputs no longer depend on its input")
    assert silenced(most, every)[0].startswith("the network's output no longer depends on its input")
    assert not silenced(every, every)
    assert not silenced(torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.bool))


def test_prune_warns_of_a_layer_that_is_gone():
    magnitude = {"name": "identity", "examples": 8}  # by default it takes none, and outputs are not looked at
    given = {"loss": "categorical", "estimator": magnitude, "sparsity": 0.8, "pattern": FLOORLESS}
    with pytest.warns(DegradedWarning) as told:
        done = sparsekit.prune(network(), data(), **given)
    assert [str(w.message) for w in told] == list(done.degraded)
    assert done.degraded[0].startswith("step 0: all 80 weights of '2.weight' are removed; prune less")
    assert done.degraded[1].startswith("step 0: the network's output no longer depends on its input")


def test_by_default_no_layer_goes_whole():
    done = sparsekit.prune(network(), data(), loss="categorical", estimator="identity", sparsity=0.8)
    assert not done.degraded
    assert int(done.mask["2.weight"].sum()) == 4  # a fifth of a fifth of 80, rounded up
