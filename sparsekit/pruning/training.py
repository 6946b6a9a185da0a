"""Training by gradients: the loop that fine-tuning and the training of dense networks share, and its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from sparsekit.errors import CurvatureError
from sparsekit.problem.likelihoods import Likelihood
from sparsekit.problem.objective import Batch, pairs

#: Training steps between two looks at the loss on an accelerator, whose host has to wait for each.
LOOK_EVERY = 16


def half_cosine(optimiser: Optimizer, learning_rate: float, total: int, *, done: int = 0) -> LRScheduler:
    """The learning rate falls to zero along a half cosine.

    Each rate follows from the number of its step alone, so that training that goes on has the rates of training that
    never stopped. torch's CosineAnnealingLR computes each rate from the one before. Rounding adds up there: most rates
    differ in the last digits, and so would all trained weights.

    Args:
        optimiser: whose rate is set.
        learning_rate: of the first step.
        total: the number of steps.
        done: how many of them have been taken before.
    """
    for group in optimiser.param_groups:
        group["initial_lr"] = learning_rate  # `lr` may be that of the step where an earlier training stopped
    return LambdaLR(optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / total)), last_epoch=done - 1)


def stepwise(optimiser: Optimizer, learning_rate: float, every: int, *, done: int = 0) -> LRScheduler:
    """The learning rate falls to a tenth after every `every` steps; see `half_cosine`."""
    for group in optimiser.param_groups:
        group["initial_lr"] = learning_rate
    return LambdaLR(optimiser, lambda step: 0.1 ** (step // every), last_epoch=done - 1)


def descend(
    model: nn.Module,
    likelihood: Likelihood,
    batches: Iterable[Batch],
    optimiser: Optimizer,
    schedule: LRScheduler,
    *,
    advice: str,
    precision: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.preserve_format,
) -> Iterator[int]:
    """Take an optimiser step along the gradient of each batch's mean loss.

    Modules are trained in the modes that they are in.

    Args:
        model: trained in place, on its own device.
        likelihood: the loss.
        batches: (inputs, targets), on any device.
        optimiser: of the model's parameters.
        schedule: of the optimiser's learning rate; stepped after the optimiser.
        precision: of forward passes; where it is not float32, by autocast, with losses in float32.
        layout: of inputs of four dimensions.
        advice: what to do where the loss is not finite, for the error's sentence.

    Yields:
        After each step, how many steps the schedule has seen.

    Raises:
        CurvatureError: the loss is not finite; that step is not taken. On an accelerator it shows up to `LOOK_EVERY`
            steps later.
        DataError: a batch is no pair of tensors.
    """
    device, losses = next(model.parameters()).device, []
    every = 1 if device.type == "cpu" else LOOK_EVERY
    for inputs, targets in pairs(batches, device):
        optimiser.zero_grad(set_to_none=True)
        given = inputs.to(memory_format=layout) if inputs.dim() == 4 else inputs
        if precision == torch.float32:
            output = model(given)
        else:
            with torch.autocast(device.type, precision):
                output = model(given).float()
        loss = likelihood.losses(output, targets).mean()
        losses.append(loss.detach())
        if len(losses) == every:
            _refuse_infinite(losses, schedule.last_epoch, advice)
            losses.clear()
        loss.backward()
        optimiser.step()
        schedule.step()
        yield schedule.last_epoch
    _refuse_infinite(losses, schedule.last_epoch - 1, advice)


def _refuse_infinite(losses: Sequence[Tensor], last: int, advice: str) -> None:
    """A CurvatureError where one of the losses, up to that of step `last`, is not finite."""
    for step, loss in enumerate(torch.stack(list(losses)).tolist() if losses else [], last - len(losses) + 1):
        if not math.isfinite(loss):
            raise CurvatureError(f"the loss became {loss} in training step {step}; {advice}")
