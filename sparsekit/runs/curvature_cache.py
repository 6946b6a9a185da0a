"""Curvature statistics that runs of one process share: what the first update at the dense weights has left behind."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsekit.methods.interfaces import CurvatureEstimator
from sparsekit.problem.objective import Objective
from sparsekit.runs.schema import run_key

#: Figure of a step whose statistics were another run's: the seconds that they took there.
SHARED_SECONDS = "shared/seconds"

#: Settings of a run that its first update does not depend on.
_AFTERWARDS = (
    "saliency", "pattern", "schedule", "sparsity", "steps", "substeps", "levels", "compensation", "reconstruction",
    "finetune", "split",
)  # fmt: skip


class SharedStatistics:
    """Keeps the last estimate that was made through it, and gives it to whoever would make the same one.

    One estimate, because rows of a large network fill the memory; whoever has several runs orders them by `key`.
    """

    def __init__(self) -> None:
        self._key = ""
        self._state: dict[str, Tensor] = {}
        self._figures: Mapping[str, float] = {}
        self._seconds = 0.0

    @staticmethod
    def key(identity: Mapping[str, Any], estimator: type[CurvatureEstimator], options: Any) -> str:
        """The same for two runs (`identity.identity`) whose first update is the same but for the damping."""
        settings = {name: value for name, value in identity["settings"].items() if name not in _AFTERWARDS}
        settings["estimator"] = {"name": estimator.name, **estimator.statistics(options)}
        return run_key({**identity, "settings": settings})

    def update(
        self, key: str, estimator: CurvatureEstimator, objective: Objective, generator: torch.Generator
    ) -> Mapping[str, float]:
        """Have `estimator` see the objective's examples, or adopt what another one saw of them.

        Returns:
            the figures of the update; of an adopted one with `shared/seconds`, what it took then.
        """
        if key == self._key and estimator.adopt(_copies(self._state)):
            return {**self._figures, SHARED_SECONDS: self._seconds}
        self._key, self._state = "", {}  # freed before as much again is made
        started = time.perf_counter()
        figures = estimator.update(objective, generator=generator)
        self._seconds = time.perf_counter() - started
        self._key, self._state, self._figures = key, _copies(estimator.state_dict()), figures
        return figures


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Estimators may change their state in place; contiguous, as a checkpoint would give it back."""
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
