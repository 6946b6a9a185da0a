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

    The mask is applied again after every optimiser step and the momentum of removed weights cleared, so that
    neither weight decay nor momentum brings one back.

    A model that is given in evaluation mode is trained as a whole, with batch statistics in batch norm and dropout.
    One that is given in training mode is trained in the modes that its modules are in: a batch norm that somebody put
    in evaluation mode keeps its statistics.

    Args:
        model: trained in place, left in its own mode.
        likelihood: the loss.
        batches: called once an epoch; gives that epoch's batches.
        space: the prunable weights.
        mask: over them, on any device.
        settings: the recipe.
        batches_per_epoch: how many batches an epoch has, to know the number of steps.
        progress: called with (steps done, steps in all).

    Returns:
        The number of optimiser steps taken.

    Raises:
        CurvatureError: the loss is not finite.
        DataError, ModelError: a batch is no pair of tensors, an epoch has none, the model's output is none, or
            autocast is on.
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
        with dense_gradients(model), tensor_outputs(model), torch.enable_grad():  # whatever the caller has switched off
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
                some(taken - before)  # or it would never end
    finally:
        optimiser.zero_grad(set_to_none=True)
        for module, training in modes.items():
            module.training = training
    return taken
