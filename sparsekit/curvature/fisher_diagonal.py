"""The diagonal of the Fisher information, from squares of gradients."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from sparsekit.curvature.passes import layer_gradients
from sparsekit.curvature.sums import RunningSum, SharedSum
from sparsekit.curvature.vectors import FisherKind
from sparsekit.problem.objective import Objective, some


def fisher_diagonal(objective: Objective, fisher: FisherKind, *, generator: torch.Generator | None = None) -> Tensor:
    """Diag F, (n,), in the objective's type: means of squared gradients over the examples.

    With 'exact' it is the diagonal of the generalised Gauss-Newton matrix; 'importance' and 'sampled' estimate it.
    Several processes share the examples.

    Args:
        objective: the examples.
        fisher: which gradients are squared, see `layer_gradients`.
        generator: for those that are drawn.

    Raises:
        DataError: there are no examples.
    """
    totals: defaultdict[str, RunningSum] = defaultdict(SharedSum)
    for gradients in layer_gradients(objective, fisher, generator=generator, shared=True):
        for name, one in gradients.items():
            one.add_squares(totals[name])
    count = some(objective.count())
    return torch.cat([totals[name].mean(count).to(objective.dtype).flatten() for name in objective.space.names])
