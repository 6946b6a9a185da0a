"""Tiny objectives in float64, one for each kind of network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsekit.problem.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from sparsekit.problem.objective import Objective
from sparsekit.problem.parameters import ParameterSpace

EXAMPLES = 11
BATCH_SIZE = 4


class _Tied(nn.Module):
    """One tensor in two layers: its gradient is a sum over both uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return output


def _linear() -> nn.Module:
    return nn.Linear(6, 4)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def _convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3),
    )


def _grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, groups=6, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


class _Sequence(nn.Module):
    """Square layers applied at each of three positions, a class predicted at each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.second(torch.tanh(self.first(x))).movedim(-1, 1)
        return output


def _no_bias() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))


def _autoencoder() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6))


def _regression() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


@dataclass(frozen=True)
class _Recipe:
    """A network, the shape of one input, the likelihood, and patterns of what is prunable (None: weights only)."""

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    likelihood: Likelihood
    include: tuple[str, ...] | None = None


_RECIPES = {
    "linear": _Recipe(_linear, (6,), Categorical(), include=("*",)),
    "mlp": _Recipe(_mlp, (5,), Categorical()),
    "convolution": _Recipe(_convolution, (2, 5, 5), Categorical(), include=("*",)),
    "grouped": _Recipe(_grouped, (4, 5, 5), Categorical()),
    "tied": _Recipe(_Tied, (5,), Categorical()),
    "sequence": _Recipe(_Sequence, (3, 4), Categorical()),
    "no_bias": _Recipe(_no_bias, (6,), Categorical()),
    "bernoulli": _Recipe(_autoencoder, (6,), Bernoulli()),
    "gaussian": _Recipe(_regression, (4,), Gaussian(variance=0.5)),
}

#: The names that `problem` knows.
PROBLEMS: tuple[str, ...] = tuple(_RECIPES)


def problem(name: str, seed: int = 0) -> Objective:
    """A tiny objective on the CPU in float64, the same at every call; a new model each time.

    The labels are drawn from the network's own distribution, so that its weights are the likeliest up to the
    noise of few examples, as after training: the mean gradient is small, single gradients are not. There are 11
    examples in batches of 4, 4 and 3, fewer than weights, so that the Fisher is singular without damping.

    Args:
        name: one of PROBLEMS. `linear`: one layer; `mlp`: with dropout; `convolution`: strides, padding and batch
            normalisation with running statistics; `grouped`: a grouped and a depthwise convolution; `tied`: one
            tensor in two layers; `sequence`: square layers at three positions; `no_bias`;
            `bernoulli`: six units; `gaussian`: two outputs. In `linear` and
            `convolution` biases and normalisation are prunable too.
        seed: of the weights and the examples; the global generator is left as it was.

    Returns:
        The objective, its model in evaluation mode, with 28 to 210 prunable weights.
    """
    recipe = _RECIPES[name]
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # layers initialise themselves from the global generator
        model = recipe.network().double().eval()
    _fill(model, draw)
    inputs = torch.randn(EXAMPLES, *recipe.shape, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        targets = _labels(recipe.likelihood, model(inputs), draw)
    batches = list(zip(inputs.split(BATCH_SIZE), targets.split(BATCH_SIZE), strict=True))
    return Objective(model, recipe.likelihood, batches, ParameterSpace.of(model, include=recipe.include))


def in_single_precision(objective: Objective) -> Objective:
    """The objective in float32; its model is changed."""
    objective.model.float()
    batches = [
        (inputs.float(), targets.float() if targets.is_floating_point() else targets)
        for inputs, targets in objective.batches
    ]
    return replace(objective, batches=batches)


@torch.no_grad()
def _fill(model: nn.Module, draw: torch.Generator) -> None:
    for parameter in model.parameters():
        parameter.normal_(generator=draw)
        parameter.mul_(1.5 * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.add_(1.0)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(generator=draw)
            module.running_var.uniform_(0.5, 1.5, generator=draw)


def _labels(likelihood: Likelihood, output: Tensor, draw: torch.Generator) -> Tensor:
    if isinstance(likelihood, Categorical):
        p = output.softmax(1).movedim(1, -1)
        return torch.multinomial(p.flatten(0, -2), 1, generator=draw).view(p.shape[:-1])
    if isinstance(likelihood, Bernoulli):
        return torch.bernoulli(output.sigmoid(), generator=draw)
    assert isinstance(likelihood, Gaussian)
    noise = torch.randn(output.shape, generator=draw, dtype=output.dtype)
    return output + likelihood.variance**0.5 * noise
