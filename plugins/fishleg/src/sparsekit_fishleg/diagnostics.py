"""The quality of Q, tensor by tensor, on held-out examples."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from sparsekit import FisherKind, Objective
from sparsekit.curvature import RunningSum, layer_gradients
from sparsekit.linalg import LinearOperator


def diagnose(
    operator: LinearOperator, damping: float, held: Objective, fisher: FisherKind, u: Tensor, generator: torch.Generator
) -> dict[str, float]:
    """Figures of each tensor against its layer-block Fisher on the held-out examples; see `FishLeg.update`.

    Args:
        operator: Q.
        damping: γ.
        held: the examples that judge.
        fisher: which Fisher.
        u: (n, k), standard normal.
        generator: for the labels.
    """
    figures, V = {}, operator @ u
    squares: defaultdict[str, RunningSum] = defaultdict(RunningSum)
    image, count = torch.zeros_like(V), held.count()
    for gradients in layer_gradients(held, fisher, generator=generator):
        for info in held.space.parameters:
            one, at = gradients[info.name], info.slice
            one.add_squares(squares[info.name])
            image[at] += one.product(V[at]) / count
    HV = image + damping * V
    r = HV - u
    Qr, model = operator @ r, operator.inverse_diagonal()
    for info in held.space.parameters:
        at = info.slice
        energy = float((u[at] * V[at]).sum())
        if not energy > 0:  # removed whole
            continue
        figures[f"{info.name}/residual"] = float((r[at] * Qr[at]).sum()) / energy
        figures[f"{info.name}/auxiliary_loss"] = (float((V[at] * HV[at]).sum()) - 2 * energy) / energy
        diagonal = squares[info.name].mean(count).flatten() + damping
        logs = torch.stack([model[at].double(), diagonal]).log()
        if bool((logs.std(1) > 0).all()):
            figures[f"{info.name}/diagonal_correlation"] = float(torch.corrcoef(logs)[0, 1])
        figures[f"{info.name}/diagonal_ratio"] = float((logs[0] - logs[1]).mean().exp())
    return figures
