import pytest
from torch import nn

from sparsekit.errors import ModelError
from sparsekit.parameters import ParameterSpace


@pytest.fixture
def model():
    """Two layers, of which the first is frozen."""
    layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    layers[0].requires_grad_(False)
    return layers


def test_a_frozen_parameter_is_skipped_with_the_reason(model):
    space = ParameterSpace.of(model)
    assert space.names == ("1.weight",)
    assert space.skipped["0.weight"] == "frozen (requires_grad=False)"


def test_a_frozen_parameter_is_pruned_where_it_is_included_by_name(model):
    assert ParameterSpace.of(model, include=["0.weight"]).names == ("0.weight",)


def test_a_model_that_is_all_frozen_is_refused_with_the_reason(model):
    with pytest.raises(ModelError, match=r"0.weight: frozen \(requires_grad=False\).*include some by name"):
        ParameterSpace.of(model.requires_grad_(False))
