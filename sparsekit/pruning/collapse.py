"""Detection of cuts after which a tensor is empty or the output does not depend on the input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsekit.problem.objective import Batch, as_found
from sparsekit.problem.parameters import Mask, ParameterSpace


def emptied(space: ParameterSpace, before: Mask, after: Mask) -> list[str]:
    """A sentence for each tensor whose last weights a cut has removed."""
    return [
        f"all {info.size:,} weights of '{info.name}' are removed; prune less, or raise the pattern's floor"
        for info in space.parameters
        if before.kept[info.slice].any() and not after.kept[info.slice].any()
    ]


def constant_outputs(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """(m,) bool: which entries of the output are equal, up to rounding, for all examples of the first batch.

    Empty where this is unknown: there is no batch, or it has one example.
    """
    if not len(batches) or len(batches[0][0]) < 2:
        return torch.zeros(0, dtype=torch.bool)
    with as_found(model), torch.no_grad():
        outputs = model(batches[0][0].to(next(model.parameters()).device))
    outputs = outputs.reshape(len(outputs), -1)
    spread = outputs.amax(0) - outputs.amin(0)
    return spread <= torch.finfo(outputs.dtype).eps ** 0.75 * outputs.abs().max()


def silenced(before: Tensor, after: Tensor) -> list[str]:
    """A sentence where a cut has made more than half of the outputs constant; see `constant_outputs`."""
    constant, count = int(after.count_nonzero()), after.numel()
    if 2 * constant <= count or constant == int((after & before).count_nonzero()):
        return []
    if constant < count:
        return [f"{constant:,} of the network's {count:,} outputs no longer depend on its input; prune less"]
    return ["the network's output no longer depends on its input; prune less"]
