"""Masked training: momentum SGD that keeps removed weights at zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn
from torch.optim import SGD

from sparsekit.methods.interfaces import FinetuneSettings
from sparsekit.problem.likelihoods import Likelihood
from sparsekit.problem.networks import dense_gradients, refuse_autocast, tensor_outputs
from sparsekit.problem.objective import Batch, some
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.pruning.keeping import clear
from sparsekit.pruning.training import descend, half_cosine, stepwise


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
    rate, momentum, decay = settings.learning_rate, settings.momentum, settings.weight_decay
    fused = next(model.parameters()).is_cuda
    optimiser = SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=decay, fused=fused)
    layout = torch.channels_last if settings.channels_last else torch.preserve_format
    if settings.decay == "cosine":
        schedule = half_cosine(optimiser, rate, total)
    else:
        every = total if settings.decay == "constant" else max(1, round(settings.decay_every * batches_per_epoch))
        schedule = stepwise(optimiser, rate, every)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    removed = _removed(model, space, mask)
    with _in_training(model), dense_gradients(model), tensor_outputs(model), torch.enable_grad():
        examples = islice(_endless(batches), total)
        advice = "lower finetune.learning_rate"
        steps = descend(
            model, likelihood, examples, optimiser, schedule,
            advice=advice, precision=getattr(torch, settings.precision), layout=layout,
        )  # fmt: skip
        for taken in steps:
            clear(removed, optimiser)
            if progress is not None:
                progress(taken, total)
    return total


def _endless(batches: Callable[[], Iterable[Batch]]) -> Iterator[Batch]:
    """Epoch after epoch.

    Raises:
        DataError: an epoch has no batches.
    """
    while True:
        count = 0
        for batch in batches():
            count += 1
            yield batch
        some(count)  # or it would never end


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode is in training mode inside. On exit all modes are restored and gradients removed."""
    modes = {module: module.training for module in model.modules()}
    if not model.training:
        model.train()
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for module, training in modes.items():
            module.training = training


def _removed(model: nn.Module, space: ParameterSpace, mask: Mask) -> list[tuple[nn.Parameter, Tensor]]:
    """Each prunable parameter with a mask of its shape, beside it."""
    removed = mask.removed.to(next(model.parameters()).device)
    return [(p, removed[space[name].slice].view(p.shape)) for name, p in space.tensors(model).items()]
