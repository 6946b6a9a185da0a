"""What is bent: a model, its likelihood, the examples and the parameters that count."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.errors import CurvatureError, DataError, ModelError
from sparsekit.likelihoods import Likelihood
from sparsekit.parameters import ParameterSpace

Batch = tuple[Tensor, Tensor]


def pairs(batches: Iterable[Any], device: torch.device | None = None) -> Iterator[Batch]:
    """The batches, looked at one by one and moved to a device: all data come in through here.

    Args:
        batches: each a tuple or list (inputs, targets) of two tensors with one row an example.
        device: where they are needed; None leaves them where they are.

    Raises:
        DataError: a batch is something else.
    """
    for batch in batches:
        if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
            raise DataError(
                f"the data gave a batch of {_kind(batch)}; a pair of tensors (inputs, targets) was needed: map each "
                "batch to such a pair, and wrap a model that takes several inputs in one that takes a single tensor"
            )
        inputs, targets = batch
        if not (inputs.dim() and targets.dim() and len(inputs) == len(targets)):
            raise DataError(
                f"the data gave a batch of inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)}; as many "
                "rows in the one as in the other were needed, a row an example: mend the data"
            )
        if device is not None:
            inputs, targets = (t.to(device, non_blocking=True) for t in (inputs, targets))
        yield inputs, targets


def _kind(value: object) -> str:
    if isinstance(value, tuple | list) and len(value) <= 4:
        return f"{type(value).__name__} ({', '.join(type(part).__name__ for part in value)})"
    return f"type {type(value).__name__}"


@contextmanager
def tensor_outputs(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, a call of the model that does not return one tensor is a ModelError."""

    def check(_model: nn.Module, _args: Any, output: object) -> None:
        if not isinstance(output, Tensor):
            raise ModelError(
                f"the model {type(model).__name__} returned {_kind(output)}; one tensor was needed: wrap it in a "
                "module that returns its logits alone"
            )

    handle = model.register_forward_hook(check)
    try:
        yield model
    finally:
        handle.remove()


@contextmanager
def as_found(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode inside; modes, buffers, `requires_grad` and gradients as they were found afterwards.

    Per-example gradients are not defined under batch statistics, and dropout would make them another
    function's; so curvature is always that of the network in evaluation mode. Outputs that are not tensors are
    refused, see `tensor_outputs`.
    """
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    owned = [(module, name, buffer) for module in modes for name, buffer in module._buffers.items()]
    model.eval()
    try:
        with tensor_outputs(model):
            yield model
    finally:
        with torch.no_grad():
            for buffer, before in buffers:  # such as a counter of calls, set in place or anew
                buffer.copy_(before)
            for module, name, found in owned:
                module._buffers[name] = found
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
        share: what an example adds to what the likelihood's mean divides by, on average; counted where None. Of
            some of an objective's batches give that of the whole, `mean_share`, so that weights stay comparable.
    """

    model: nn.Module
    likelihood: Likelihood
    batches: Iterable[Batch]
    space: ParameterSpace
    share: float | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The model's type of number."""
        return next(self.model.parameters()).dtype

    def on_device(self) -> Iterator[Batch]:
        """The batches, moved to the model's device; a DataError where one is no pair of tensors, see `pairs`."""
        yield from pairs(self.batches, self.device)

    @cached_property
    def mean_share(self) -> float:
        """What an example adds to what the likelihood's mean divides by, over all examples; reads targets alone.

        Raises:
            DataError: the targets are all ignored.
        """
        if self.share is not None:
            return self.share
        total, count = 0.0, 0
        for _, targets in pairs(self.batches):
            total += self.likelihood.divisor(targets)
            count += len(targets)
        return counting(total, count) / count

    def weighted(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """The batches on the model's device, each with what its examples weigh in the mean over all, 1 on average.

        Only a likelihood's weights of positions make it another number than 1.
        """
        for inputs, targets in self.on_device():
            yield inputs, targets, self.likelihood.divisor(targets) / len(targets) / self.mean_share

    def check(self) -> None:
        """One batch through the model and the loss, so that what cannot be used is refused before any work.

        Raises:
            DataError, ModelError: the batch is no pair of tensors, or the model's output is none.
            CurvatureError: a loss is not finite.
        """
        with as_found(self.model), torch.no_grad():
            for inputs, targets in self.on_device():
                if inputs.is_floating_point() and inputs.dtype.itemsize > self.dtype.itemsize:
                    raise DataError(
                        f"the data's inputs are {inputs.dtype}, the model {self.dtype}; convert one of them"
                    )
                output = self.model(inputs)
                _check_examples_stand_alone(self.model, inputs, output)
                losses = self.likelihood.losses(output, targets)
                if not bool(losses.isfinite().all()):
                    raise CurvatureError(
                        "the loss is not finite at the weights given; check the data, the loss and the checkpoint"
                    )
                return

    def count(self) -> int:
        """The number of examples, N."""
        return sum(len(targets) for _, targets in pairs(self.batches))

    def loss(self) -> float:
        """L(w) at the model's present weights."""
        total, count = 0.0, 0
        with as_found(self.model), torch.no_grad():
            for inputs, targets, weight in self.weighted():
                losses = self.likelihood.losses(self.model(inputs), targets)
                total += float(losses.double().sum()) * weight
                count += len(losses)
        return finite_loss(total / some(count))

    def gradient(self) -> Tensor:
        """∇L(w), (n,)."""
        total, count = None, 0
        with as_found(self.model), torch.enable_grad():
            tensors = self.space.tensors(self.model)
            for parameter in tensors.values():
                parameter.requires_grad_(True)
            for inputs, targets, weight in self.weighted():
                losses = self.likelihood.losses(self.model(inputs), targets)
                gradients = torch.autograd.grad(losses.sum() * weight, list(tensors.values()), materialize_grads=True)
                flat = self.space.flatten(dict(zip(tensors, gradients, strict=True)))
                total = flat if total is None else total + flat
                count += len(losses)
        if total is None:
            some(count)
            raise AssertionError
        return total / count


def _check_examples_stand_alone(model: nn.Module, inputs: Tensor, output: Tensor) -> None:
    """Refuse a model that gives an example another output in a batch than alone: it has no loss by example.

    Raises:
        ModelError: the first example's outputs differ by more than rounding, and not from one call to the next.
    """
    if len(inputs) < 2:
        return
    alone, first = model(inputs[:1]).detach().double(), output[:1].detach().double()
    if alone.shape != first.shape:
        raise ModelError(
            f"the model gives outputs {tuple(output.shape)} for {len(inputs)} examples, {tuple(alone.shape)} for one; "
            "a row an example was needed"
        )
    tolerance = 100 * torch.finfo(output.dtype).eps ** 0.75  # 1e-3 of the largest output in float32, 4e-1 in bfloat16
    scale = float(output.detach().double().abs().max())
    if float((alone - first).abs().max()) <= tolerance * scale or not math.isfinite(scale):
        return
    again = model(inputs).detach().double()[:1]
    if float((again - first).abs().max()) > tolerance * scale:  # random in evaluation mode: another matter
        return
    raise ModelError(
        f"the model {type(model).__name__} gives an example another output in a batch than alone (differences of up to "
        f"{float((alone - first).abs().max()) / max(scale, 1e-300):.1e} of the largest output): its loss is no mean "
        "over examples, and has no curvature by example; take out what mixes them, such as a mean over the batch"
    )


class Mean:
    """A mean over examples, batch by batch, in one pass.

    Each batch has a mean of its own, divided by whatever it was; batches count in proportion to that.
    """

    def __init__(self) -> None:
        self._total, self._count, self._examples, self._unit = 0.0, 0.0, 0, 0.0

    def add(self, values: Tensor, divisor: float) -> None:
        """A batch's values, (N,)."""
        share = divisor / len(values)
        self._examples += len(values)
        if share:  # else all are ignored
            self._unit = self._unit or share  # so that shares that are alike count exactly 1
            self._total += float(values.double().sum()) * (share / self._unit)
            self._count += len(values) * (share / self._unit)

    @property
    def value(self) -> float:
        """The mean; 0 without any examples."""
        return self._total / counting(self._count, self._examples) if self._examples else 0.0


def counting(total: float, examples: int) -> float:
    """What a mean over so many examples divides by, which must not be zero."""
    if some(examples) and not total:
        raise DataError(
            f"the targets of all {examples} examples are ignored, or their classes have no weight: mend the data, or "
            "give another ignore_index or weight to the loss"
        )
    return total


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
