"""Batch normalisation statistics, taken anew after a cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsekit.problem.objective import Batch, pairs


def running_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch normalisations whose statistics follow the data.

    A model in training mode with a batch norm in evaluation mode has frozen that one, as in fine-tuning.
    """
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and (module.training or not model.training)
    ]


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Batch]) -> bool:
    """Replace running means and variances by the averages over the batches, layer after layer in one pass.

    `torch.optim.swa_utils.update_bn` with the rest of the model in evaluation mode: dropout would change the
    statistics. Batches of one example are skipped, which have no variance.

    Args:
        model: changed in place; its modes are restored.
        batches: examples, inputs first.

    Returns:
        Whether there was a batch normalisation to recalibrate.
    """
    norms = running_norms(model)
    if not norms:
        return False
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    model.eval()
    calls: Counter[nn.Module] = Counter()

    def cumulative(norm: _BatchNorm, _: object) -> None:
        calls[norm] += 1
        norm.momentum = 1 / calls[norm]  # what None stands for, without asking the device for its count

    hooks = [norm.register_forward_pre_hook(cumulative) for norm in norms]
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
    try:
        for inputs, _ in pairs(batches, next(model.parameters()).device):
            if len(inputs) > 1:
                model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
    return True
