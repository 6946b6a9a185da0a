"""Masked training: momentum SGD that keeps removed weights at zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from sparsekit.errors import CurvatureError
from sparsekit.methods.interfaces import FinetuneSettings
from sparsekit.problem.likelihoods import Likelihood
from sparsekit.problem.networks import dense_gradients, refuse_autocast, tensor_outputs
from sparsekit.problem.objective import Batch, pairs, some
from sparsekit.problem.parameters import Mask, ParameterSpace


def finetune(
    model: nn.Module,
    likelihood: Likelihood,
    batches: Callable[[], Iterable[Batch]],
    space: ParameterSpace,
    mask: Mask,
    settings: FinetuneSettings,
    *,
    batches_per_epoch: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Train all of the model's parameters in place; removed weights stay zero.

    After every optimiser step the mask is applied again and the momentum of removed weights is cleared, so that
    neither weight decay nor momentum changes them.

    A model given in evaluation mode is trained with all its modules in training mode, that is with batch statistics
    and dropout. A model given in training mode is trained in the modes that its modules have: a batch norm in
    evaluation mode keeps its statistics.

    Args:
        model: trained in place; its modes are restored at the end.
        likelihood: the loss.
        batches: called once in each epoch; returns that epoch's batches.
        space: the prunable weights.
        mask: over them, on any device.
        settings: the recipe.
        batches_per_epoch: number of batches in an epoch, which determines the number of steps.
        progress: called with (steps done, steps in all).

    Returns:
        The number of optimiser steps taken.

    Raises:
        CurvatureError: the loss is not finite.
        DataError, ModelError: a batch is not a pair of tensors, an epoch has no batches, the model's output is not a
            tensor, or autocast is on.
    """
    refuse_autocast()
    total = math.ceil(settings.epochs * batches_per_epoch)
    if total == 0:
        return 0
    optimiser = torch.optim.SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    decay = (lambda t: 0.5 * (1 + math.cos(math.pi * t / total))) if settings.decay == "cosine" else (lambda t: 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, decay)
    device = next(model.parameters()).device
    tensors = space.tensors(model)
    removed = mask.removed.to(device)
    gone = {name: removed[space[name].slice].view(p.shape) for name, p in tensors.items()}
    modes = {module: module.training for module in model.modules()}
    if not model.training:
        model.train()
    taken = 0
    try:
        with dense_gradients(model), tensor_outputs(model), torch.enable_grad():  # even if the caller has disabled it
            while taken < total:
                before = taken
                for inputs, targets in pairs(batches(), device):
                    optimiser.zero_grad(set_to_none=True)
                    loss = likelihood.losses(model(inputs), targets).mean()
                    if not bool(loss.isfinite()):
                        raise CurvatureError(
                            f"the loss became {float(loss.detach())} in fine-tuning step {taken}; "
                            "lower finetune.learning_rate"
                        )
                    loss.backward()
                    optimiser.step()
                    schedule.step()
                    with torch.no_grad():
                        for name, parameter in tensors.items():
                            parameter.masked_fill_(gone[name], 0.0)
                            momentum = optimiser.state[parameter].get("momentum_buffer")
                            if momentum is not None:
                                momentum.masked_fill_(gone[name], 0.0)
                    taken += 1
                    if progress is not None:
                        progress(taken, total)
                    if taken == total:
                        break
                some(taken - before)  # without batches this would never end
    finally:
        optimiser.zero_grad(set_to_none=True)
        for module, training in modes.items():
            module.training = training
    return taken
