"""A cache of the statistics from the first update at the dense weights, shared by the runs of one process."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsekit.methods.interfaces import CurvatureEstimator, EstimatorSettings
from sparsekit.problem.objective import Objective
from sparsekit.runs.schema import run_key

#: Figure of a step with shared statistics: the seconds that they took in the other run.
SHARED_SECONDS = "shared/seconds"

#: Settings of a run on which its first update does not depend.
_AFTERWARDS = (
    "saliency", "pattern", "schedule", "sparsity", "steps", "substeps", "levels", "compensation", "reconstruction",
    "finetune", "split",
)  # fmt: skip


class SharedStatistics:
    """Keeps the last estimate, and gives it to estimators that would compute the same.

    It keeps only one, because the rows of a large network fill the memory: order several runs by `key`.
    """

    def __init__(self) -> None:
        self._key = ""
        self._state: dict[str, Tensor] = {}
        self._figures: Mapping[str, float] = {}
        self._seconds = 0.0

    @staticmethod
    def key(identity: Mapping[str, Any], estimator: type[CurvatureEstimator], options: EstimatorSettings) -> str:
        """A key that is equal for two runs (`identity.identity`) whose first updates differ in the damping at most."""
        settings = {name: value for name, value in identity["settings"].items() if name not in _AFTERWARDS}
        settings["estimator"] = {"name": estimator.name, **estimator.statistics(options)}
        return run_key({**identity, "settings": settings})

    def update(
        self, key: str, estimator: CurvatureEstimator, objective: Objective, generator: torch.Generator
    ) -> Mapping[str, float]:
        """Update the estimator on the objective's examples, or let it adopt the cached statistics of the same update.

        Returns:
            The figures of the update; for an adopted one also `shared/seconds`, the time that it took.
        """
        if key == self._key and estimator.adopt(_copies(self._state)):
            return {**self._figures, SHARED_SECONDS: self._seconds}
        self._key, self._state = "", {}  # freed before the same amount is allocated
        started = time.perf_counter()
        figures = estimator.update(objective, generator=generator)
        self._seconds = time.perf_counter() - started
        self._key, self._state, self._figures = key, _copies(estimator.state_dict()), figures
        return figures


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, because estimators may change their state in place; contiguous, as from a checkpoint."""
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
