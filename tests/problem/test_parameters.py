import pytest
import torch
import torchvision
from torch import nn

from sparsekit.errors import ModelError
from sparsekit.problem.parameters import ParameterSpace


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


@pytest.mark.parametrize("name", ["convnext_tiny", "vit_b_16", "swin_t"])
def test_scales_tokens_and_tables_are_no_weights(name):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None)
    space = ParameterSpace.of(model)
    odd = ("layer_scale", "class_token", "pos_embedding", "relative_position_bias_table")
    assert not [weight for weight in space.names if weight.endswith(odd)]
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    attention = [m.in_proj_weight for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    assert space.size == sum(layer.weight.numel() for layer in layers) + sum(w.numel() for w in attention)


def old(norm):
    """Torch's former norms, which warn that they are."""

    def made(layer):
        with pytest.warns(FutureWarning):
            return norm(layer)

    return made


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (nn.utils.parametrizations.weight_norm, "remove_parametrizations"),
        (nn.utils.parametrizations.orthogonal, "remove_parametrizations"),
        (nn.utils.parametrizations.spectral_norm, "remove_parametrizations"),
        (old(nn.utils.weight_norm), "remove_weight_norm"),
        (nn.utils.spectral_norm, "remove_spectral_norm"),
    ],
    ids=["weight_norm", "orthogonal", "spectral_norm", "old weight_norm", "old spectral_norm"],
)
def test_weights_that_are_computed_at_each_call_are_refused(change, advice):
    model = nn.Sequential(change(nn.Linear(4, 4)), nn.Linear(4, 2))
    with pytest.raises(ModelError, match=f"{advice}.* first, or exclude it"):
        ParameterSpace.of(model)
    assert ParameterSpace.of(model, include=["1.weight"]).names == ("1.weight",)


def test_parametrised_layers_that_nobody_prunes_are_let_be():
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    nn.utils.parametrizations.orthogonal(layers[0]).requires_grad_(False)  # frozen
    nn.utils.parametrize.register_parametrization(layers[1], "bias", nn.Tanh())
    assert ParameterSpace.of(layers).names == ("1.weight", "2.weight")


def test_the_advice_names_the_tensor_that_is_computed():
    attention = nn.MultiheadAttention(4, 2)
    nn.utils.parametrize.register_parametrization(attention, "in_proj_weight", nn.Tanh())
    with pytest.raises(ModelError, match=r"remove_parametrizations\(layer, 'in_proj_weight'\) first"):
        ParameterSpace.of(attention)


def test_a_name_with_brackets_is_the_name_itself():
    model = nn.Module()
    model.add_module("a[0]", nn.Linear(2, 2))
    assert ParameterSpace.of(model, include=["a[0].weight"]).names == ("a[0].weight",)


def test_a_parameter_without_entries_is_skipped():
    model = nn.Linear(2, 2)
    model.weight_of_none = nn.Parameter(torch.zeros(0, 5))
    assert ParameterSpace.of(model).skipped["weight_of_none"] == "it has no entries"
