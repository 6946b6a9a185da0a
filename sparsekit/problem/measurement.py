"""Loss and accuracy of a network on some examples."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from sparsekit.problem.likelihoods import Likelihood
from sparsekit.problem.objective import Batch, Mean, as_found, pairs


def measure(model: nn.Module, likelihood: Likelihood, batches: Iterable[Batch]) -> dict[str, float]:
    """The mean loss over the examples, and accuracy in [0, 1] where the likelihood has one.

    Both are over the positions that are not ignored and do not depend on the batches.

    Raises:
        DataError, ModelError: a batch is not a pair of tensors, or the model's output is not a tensor.
    """
    device = next(model.parameters()).device
    loss, right, has_accuracy = Mean(), Mean(), True
    with as_found(model), torch.no_grad():
        for inputs, targets in pairs(batches, device):
            output = model(inputs)
            loss.add(likelihood.losses(output, targets), likelihood.divisor(targets))
            accuracy = likelihood.accuracy(output, targets)
            has_accuracy = accuracy is not None
            if accuracy is not None:
                right.add(accuracy, likelihood.counted(targets))
    return {"loss": loss.value} | ({"accuracy": right.value} if has_accuracy else {})
