"""The two Kronecker factors of each layer's Fisher information, as K-FAC takes them."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekit.curvature.layers import SLICE
from sparsekit.curvature.passes import layer_gradients
from sparsekit.curvature.sums import RunningSum
from sparsekit.curvature.vectors import FisherKind
from sparsekit.problem.objective import Objective, some


class KroneckerFactors(NamedTuple):
    """Second moments of what a layer's weight is applied to and of its outputs' gradients, float64.

    `outputs` ⊗ `inputs` approximates the weight's own block of F, group by group, on row-major (out, in·k); for one
    example and one position it is that block.

    Attributes:
        inputs: E Σ_t a_t a_tᵀ, (groups, in·k/groups, in·k/groups), t the positions of all uses of the layer.
        outputs: E (1/T) Σ_t d_t d_tᵀ, (groups, out/groups, out/groups).
    """

    inputs: Tensor
    outputs: Tensor


def kronecker_factors(
    objective: Objective, fisher: FisherKind = "importance", *, generator: torch.Generator | None = None
) -> dict[str, KroneckerFactors]:
    """Both factors of every prunable weight whose gradients are products of them: Linear, Conv1d and Conv2d.

    Uses of one weight in several places count as more positions. Parameters of other kinds are left out.

    Args and errors: as `layer_gradients`.

    Reference: Martens and Grosse, 2015 (K-FAC); Grosse and Martens, 2016 (convolutions).
    """
    inputs: defaultdict[str, RunningSum] = defaultdict(RunningSum)
    outputs: defaultdict[str, RunningSum] = defaultdict(RunningSum)
    seen = 0  # examples, with `exact` once for each column of Λ^{1/2}: so do their inputs
    for gradients in layer_gradients(objective, fisher, generator=generator):
        for name, one in gradients.items():
            T, (groups, _, inner) = one.positions, one.matrices
            if not T:
                continue
            step = max(1, SLICE // (groups * T * inner))
            for first in range(0, len(one), step):
                A, D = (part.flatten(1, 2) for part in one.factors(slice(first, first + step)))
                inputs[name].add_product(A, A)
                outputs[name].add_product(D, D / T)
        seen += len(next(iter(gradients.values())))
    count = some(objective.count())
    return {name: KroneckerFactors(inputs[name].mean(seen), outputs[name].mean(count)) for name in inputs}
