"""Removed weights stay zero in loops that know nothing of them."""

import pytest
import torch
from torch import nn

import sparsekit
from sparsekit.errors import ModelError, SettingsError


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def mask(model):
    draw = torch.Generator().manual_seed(1)
    return {name: torch.rand(p.shape, generator=draw) > 0.6 for name, p in model.named_parameters() if p.dim() > 1}


def train(model, optimiser, steps=50, scaler=None, accumulate=1):
    draw = torch.Generator().manual_seed(2)
    for step in range(steps):
        x = torch.randn(16, 6, generator=draw)
        loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
        (loss if scaler is None else scaler.scale(loss)).backward()
        if (step + 1) % accumulate:
            continue
        if scaler is None:
            optimiser.step()
        else:
            scaler.step(optimiser)
            scaler.update()
        optimiser.zero_grad()


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
def test_exactly_the_zeros_are_kept(model, mask, make):
    optimiser = make(model.parameters())
    with sparsekit.keep(model, mask):
        train(model, optimiser)
    for name, kept in mask.items():
        weight = model.get_parameter(name)
        assert bool((weight[~kept] == 0).all()) and bool((weight[kept] != 0).all())


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
def test_what_an_optimiser_remembers_of_a_removed_weight_is_zero(model, mask, make):
    optimiser = make(model.parameters())
    with sparsekit.keep(model, mask):
        train(model, optimiser)
    for name, kept in mask.items():
        weight = model.get_parameter(name)
        state = [v for v in optimiser.state[weight].values() if isinstance(v, torch.Tensor) and v.shape == weight.shape]
        assert state and all(bool((value[~kept] == 0).all()) for value in state)


def test_with_gradient_accumulation_and_a_scaler(model, mask):
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    with sparsekit.keep(model, mask):
        train(model, optimiser, scaler=torch.amp.GradScaler("cpu"), accumulate=3)
    assert sparsekit.check(model, mask) > 0.5


def test_a_wrapper_s_prefix_is_no_part_of_a_name(model, mask):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    wrapped = Wrapper(model)
    with sparsekit.keep(wrapped, mask):
        train(wrapped, torch.optim.AdamW(wrapped.parameters(), lr=0.01))
    assert sparsekit.check(model, {f"module.{name}": kept for name, kept in mask.items()}) > 0.5


@pytest.mark.slow  # compiles
def test_in_a_compiled_model(model, mask):
    compiled = torch.compile(model)
    with sparsekit.keep(compiled, mask):
        train(compiled, torch.optim.AdamW(compiled.parameters(), lr=0.01))
    assert sparsekit.check(compiled, mask) > 0.5


def test_weights_are_zero_at_once_and_free_afterwards(model, mask):
    kept = sparsekit.keep(model, mask)
    assert sparsekit.check(model, mask) > 0.5
    kept.remove()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=2)
    with pytest.raises(ModelError, match=r"removed weights are not zero: \d+ of '0.weight'.*sparsekit.keep"):
        sparsekit.check(model, mask)


def test_other_models_are_left_alone(model, mask):
    other = nn.Linear(6, 3)
    with sparsekit.keep(model, mask):
        train(other, torch.optim.SGD(other.parameters(), lr=0.1), steps=3)
    assert bool((other.weight != 0).all())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: {"0.wieght": m["0.weight"]}, ModelError, "no parameter '0.wieght'; did you mean '0.weight'"),
        (lambda m: {"0.weight": m["2.weight"]}, ModelError, r"has the shape \(3, 8\), the parameter \(8, 6\)"),
        (lambda m: {"0.weight": m["0.weight"].float()}, SettingsError, "is torch.float32; a bool tensor"),
    ],
)
def test_a_mask_of_something_else_is_refused(model, mask, change, error, message):
    with pytest.raises(error, match=message):
        sparsekit.keep(model, change(mask))
