"""Weights that the loss does not depend on, as in auxiliary heads: a sparsity that counts them is overstated."""

from __future__ import annotations

import torch

from sparsekit.problem.objective import Objective, as_found
from sparsekit.problem.parameters import ParameterSpace

#: Reason for skipping a parameter that no gradient reaches.
UNUSED = "no gradient reaches it: the loss does not depend on it; include it by name to prune it"


def unused(objective: Objective) -> list[str]:
    """Names of the space's tensors that no example's loss depends on, in flat order.

    Batches are read until every tensor has been reached, as a router may send the first examples elsewhere. The list is
    empty where no gradient can be taken or none reaches any tensor: the cause is then the model's code.
    """
    with as_found(objective.model), torch.enable_grad():
        tensors = objective.space.tensors(objective.model)
        for parameter in tensors.values():
            parameter.requires_grad_(True)
        left = dict(tensors)
        for inputs, targets in objective.on_device():
            losses = objective.likelihood.losses(objective.model(inputs), targets)
            if not losses.requires_grad:
                continue
            try:
                gradients = torch.autograd.grad(losses.sum(), list(left.values()), allow_unused=True)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # an estimator that needs gradients says why there are none
                return []
            left = {name: left[name] for name, found in zip(left, gradients, strict=True) if found is None}
            if not left:
                break
    return [] if len(left) == len(tensors) else list(left)


def used(objective: Objective, *, included: bool) -> tuple[ParameterSpace, list[str]]:
    """The objective's space without its `unused` tensors, and warnings about them.

    Args:
        objective: at the dense weights.
        included: whether the space was chosen by name; then it stays whole, with a warning for each such tensor.
    """
    found = unused(objective)
    if included:
        return objective.space, [f"no gradient reaches '{name}', which is pruned as it was included" for name in found]
    return objective.space.without(dict.fromkeys(found, UNUSED)), []
