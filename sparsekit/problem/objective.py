"""The loss as a function of the prunable weights: a model, its likelihood, examples and parameters."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from sparsekit.errors import CurvatureError, DataError, ModelError
from sparsekit.problem.likelihoods import Likelihood
from sparsekit.problem.networks import as_found, check_examples_apart, check_values, kind_of, outputs, tensor_outputs
from sparsekit.problem.parameters import ParameterSpace

__all__ = ["Batch", "Objective", "as_found", "finite_loss", "pairs", "some", "tensor_outputs"]

Batch = tuple[Tensor, Tensor]


def pairs(batches: Iterable[object], device: torch.device | None = None) -> Iterator[Batch]:
    """The batches, checked one by one and moved to a device; all data pass through this function.

    Args:
        batches: each a tuple or list (inputs, targets) of two tensors with one row for each example.
        device: None leaves them where they are.

    Raises:
        DataError: a batch is something else.
    """
    made = device is None or device.type == "cpu" or isinstance(batches, list | tuple)
    for batch in batches if made else ahead(batches):
        if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
            raise DataError(
                f"the data gave a batch of {kind_of(batch)}; a pair of tensors (inputs, targets) was needed: map each "
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


def ahead(batches: Iterable[object], depth: int = 2) -> Iterator[object]:
    """The same batches, of which another thread prepares the next `depth`: an accelerator need not wait for them.

    Tensors on the CPU come in pinned memory where there is CUDA, from which copies do not hold up the host.
    """
    source, end = iter(batches), object()

    def following() -> object:
        batch = next(source, end)
        if torch.cuda.is_available() and isinstance(batch, tuple | list):
            return type(batch)(t.pin_memory() if isinstance(t, Tensor) and t.device.type == "cpu" else t for t in batch)
        return batch

    with ThreadPoolExecutor(1, "batches") as pool:
        waiting = deque(pool.submit(following) for _ in range(depth))
        while (batch := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(following))
            yield batch


@dataclass(frozen=True)
class Objective:
    """L(w) = mean over the examples of the likelihood's loss, as a function of the space's weights.

    Attributes:
        model: any module from a batch of inputs to a batch of outputs.
        likelihood: the loss.
        batches: the examples, (inputs, targets) batch by batch; a sequence or anything else that can be
            iterated over again and gives the same examples each time.
        space: the weights of which L is a function.
        share: what an example adds to the divisor of the likelihood's mean, on average; counted where None. An
            objective on some batches of another one takes that one's `mean_share`, so that weights stay comparable.
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
        """The model's floating-point type."""
        return next(self.model.parameters()).dtype

    def on_device(self) -> Iterator[Batch]:
        """The batches, moved to the model's device; a DataError if one is not a pair of tensors, see `pairs`."""
        yield from pairs(self.batches, self.device)

    @cached_property
    def mean_share(self) -> float:
        """What an example adds to the divisor of the likelihood's mean, averaged over all; reads only the targets.

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
        """The batches on the model's device, each with the weight of its examples in the mean over all, 1 on average.

        The weight differs from 1 only where the likelihood has weights of positions.
        """
        for inputs, targets in self.on_device():
            yield inputs, targets, self.likelihood.divisor(targets) / len(targets) / self.mean_share

    def check(self) -> None:
        """Pass one batch through the model and the loss, so that unusable ones are refused before any work.

        Raises:
            DataError: the batch is not a pair of tensors, or has NaN among them.
            ModelError: the model fails on it, or its output is not a tensor, or depends on the batch's other examples.
            CurvatureError: an output is NaN, or a loss not finite.
        """
        check_values(self.model)
        with as_found(self.model), torch.no_grad():
            for inputs, targets in self.on_device():
                output = outputs(self.model, inputs)
                _refuse_nan(inputs, targets, output)
                check_examples_apart(self.model, inputs)
                losses = self.likelihood.losses(output, targets)
                if not bool(losses.isfinite().all()):
                    raise CurvatureError(
                        "the loss is not finite at the weights given; check the data, the loss and the checkpoint"
                    )
                self._check_gradient(inputs[:1], targets[:1])
                return

    def _check_gradient(self, inputs: Tensor, targets: Tensor) -> None:
        tensors = list(self.space.tensors(self.model).values())
        for parameter in tensors:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            loss = self.likelihood.losses(self.model(inputs), targets).sum()
        try:
            if loss.requires_grad:
                torch.autograd.grad(loss, tensors, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise ModelError(
                f"the model {type(self.model).__name__} uses reentrant checkpointing, through which the gradients of "
                "chosen tensors cannot be taken; call torch.utils.checkpoint.checkpoint with use_reentrant=False"
            ) from error

    def count(self) -> int:
        """The number of examples, N."""
        return sum(len(targets) for _, targets in pairs(self.batches))

    def loss(self) -> float:
        """L(w) at the model's present weights."""
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        with as_found(self.model), torch.no_grad():
            for inputs, targets, weight in self.weighted():
                losses = self.likelihood.losses(self.model(inputs), targets)
                total += losses.double().sum() * weight
                count += len(losses)
        return finite_loss(float(total) / some(count))

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


class Mean:
    """A mean over examples, batch by batch, in one pass.

    Batches count in proportion to the divisor of their own mean.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None  # stays on the device until it is asked for
        self._count, self._examples, self._unit = 0.0, 0, 0.0

    def add(self, values: Tensor, divisor: float) -> None:
        """A batch's values, (N,)."""
        share = divisor / len(values)
        self._examples += len(values)
        if share:  # else all are ignored
            self._unit = self._unit or share  # relative to the first, so that equal shares count exactly 1
            part = values.double().sum() * (share / self._unit)
            self._total = part if self._total is None else self._total + part
            self._count += len(values) * (share / self._unit)

    @property
    def value(self) -> float:
        """The mean; 0 without any examples."""
        if not self._examples:
            return 0.0
        count = counting(self._count, self._examples)
        return (0.0 if self._total is None else float(self._total)) / count


def counting(total: float, examples: int) -> float:
    """The divisor of a mean over so many examples; a DataError if it is zero."""
    if some(examples) and not total:
        raise DataError(
            f"the targets of all {examples} examples are ignored, or their classes have no weight: mend the data, or "
            "give another ignore_index or weight to the loss"
        )
    return total


def some(count: int) -> int:
    """The count; a DataError if it is zero."""
    if count == 0:
        raise DataError("the data gave no batch; at least one batch of (inputs, targets) is needed")
    return count


def finite_loss(value: float) -> float:
    """The loss; a CurvatureError if it is NaN."""
    if math.isnan(value):
        raise CurvatureError("the loss is NaN at the present weights; check the data, the loss and the checkpoint")
    return value


def _refuse_nan(inputs: Tensor, targets: Tensor, output: Tensor) -> None:
    """Refuse NaN where it is first, before a loss makes something else of it. Infinities may be meant, as masks."""
    for what, values in (("inputs", inputs), ("targets", targets)):
        if bool(values.isnan().any()):
            raise DataError(f"the {what} of the data's first batch contain NaN; mend the data")
    if bool(output.isnan().any()):
        raise CurvatureError("the model's outputs contain NaN, though its inputs have none; check the checkpoint")
