"""What is bent: a model, its likelihood, the examples and the parameters that count."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsekit.errors import CurvatureError, DataError
from sparsekit.likelihoods import Likelihood
from sparsekit.parameters import ParameterSpace

Batch = tuple[Tensor, Tensor]


@contextmanager
def as_found(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode inside; modes, `requires_grad` and gradients as they were found afterwards.

    Per-example gradients are not defined under batch statistics, and dropout would make them another
    function's; so curvature is always that of the network in evaluation mode.
    """
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@dataclass(frozen=True)
class Objective:
    """L(w) = mean over the examples of the likelihood's loss, as a function of the space's weights.

    Attributes:
        model: any module from a batch of inputs to a batch of outputs.
        likelihood: the loss.
        batches: the examples, (inputs, targets) batch by batch; a sequence or anything else that can be
            iterated over again and gives the same examples each time.
        space: the weights that count.
    """

    model: nn.Module
    likelihood: Likelihood
    batches: Iterable[Batch]
    space: ParameterSpace

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The model's type of number."""
        return next(self.model.parameters()).dtype

    def on_device(self) -> Iterator[Batch]:
        """The batches, moved to the model's device."""
        device = self.device
        for inputs, targets in self.batches:
            yield inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)

    def count(self) -> int:
        """The number of examples, N."""
        return sum(len(targets) for _, targets in self.batches)

    def loss(self) -> float:
        """L(w) at the model's present weights."""
        total, count = 0.0, 0
        with as_found(self.model), torch.no_grad():
            for inputs, targets in self.on_device():
                losses = self.likelihood.losses(self.model(inputs), targets)
                total += float(losses.double().sum())
                count += len(losses)
        return finite_loss(total / some(count))

    def gradient(self) -> Tensor:
        """∇L(w), (n,)."""
        total, count = None, 0
        with as_found(self.model):
            tensors = self.space.tensors(self.model)
            for parameter in tensors.values():
                parameter.requires_grad_(True)
            for inputs, targets in self.on_device():
                losses = self.likelihood.losses(self.model(inputs), targets)
                gradients = torch.autograd.grad(losses.sum(), list(tensors.values()), materialize_grads=True)
                flat = self.space.flatten(dict(zip(tensors, gradients, strict=True)))
                total = flat if total is None else total + flat
                count += len(losses)
        if total is None:
            some(count)
            raise AssertionError
        return total / count


def some(count: int) -> int:
    """The count, which must not be zero."""
    if count == 0:
        raise DataError("the data gave no batch; at least one batch of (inputs, targets) is needed")
    return count


def finite_loss(value: float) -> float:
    """The loss, which must be a number."""
    if math.isnan(value):
        raise CurvatureError("the loss is NaN at the present weights; check the data, the loss and the checkpoint")
    return value
