"""Per-example gradients, streamed: the rows whose second moment is the Fisher information."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsekit.curvature.passes import layer_gradients
from sparsekit.curvature.sums import FiniteSums
from sparsekit.curvature.vectors import FisherKind
from sparsekit.problem.objective import Objective


def gradient_rows(
    objective: Objective, fisher: FisherKind = "importance", *, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Rows G (b, n) with Σ over all rows of g gᵀ = N · F, N the number of examples.

    One row an example, but for `exact` a row an example and column of Λ^{1/2}, as several blocks of b rows for
    each batch. Every block is the caller's to keep. They take b·n numbers: `layer_gradients` gives most sums over
    examples without them.

    Args and errors: as `layer_gradients`.
    """
    space, finite = objective.space, FiniteSums()
    for gradients in layer_gradients(objective, fisher, generator=generator):
        rows = None
        for name, one in gradients.items():
            found = one.rows()
            if rows is None:
                rows = found.new_empty(len(one), space.size)
            rows[:, space[name].slice] = found.reshape(len(one), -1)
        assert rows is not None
        finite.add({info.name: [rows[:, info.slice]] for info in space.parameters})  # factors may be finite alone
        yield rows
    finite.check()


def per_example_gradients(
    objective: Objective, fisher: FisherKind = "importance", *, generator: torch.Generator | None = None
) -> Iterator[dict[str, Tensor]]:
    """As `gradient_rows`, by parameter: name -> (b, *shape)."""
    for rows in gradient_rows(objective, fisher, generator=generator):
        yield objective.space.unflatten_rows(rows)
