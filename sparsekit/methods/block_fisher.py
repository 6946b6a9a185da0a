"""The base of estimators that invert the Fisher on blocks, from gradient rows or from block statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparsekit.curvature import averaged_rows, gradient_rows
from sparsekit.errors import CurvatureError, DataError
from sparsekit.machine import Memory
from sparsekit.methods.block_settings import BlockFisherSettings
from sparsekit.methods.estimator import CurvatureEstimator, EstimatorSettings
from sparsekit.methods.kept_blocks import KeptBlocks
from sparsekit.methods.kept_rows import KeptRows
from sparsekit.problem.objective import Objective, some
from sparsekit.problem.parameters import ParameterSpace
from sparsekit.removal import InverseFisher


class BlockFisher(CurvatureEstimator[BlockFisherSettings]):
    """H_b = (1/m) Σ_j g_j g_jᵀ + γI on blocks of consecutive weights, inverted exactly.

    Optimal Brain Surgeon on blocks (oBERT), WoodFisher and M-FAC all invert this matrix, as published by a rank-one
    recursion in m steps. Here the method depends on the sizes. Where B ≤ m the statistics Σ g gᵀ are kept and inverted
    by a batched Cholesky factorisation in float64, so that another damping, a mask or more gradients need no new
    statistics. Where m < B the m rows are kept and inverted by Woodbury's identity in the memory of the rows, O(mn).

    A plugin gives the class a name, and the settings their published defaults.
    """

    Settings: ClassVar[type[EstimatorSettings]] = BlockFisherSettings
    memory_settings: ClassVar[tuple[str, ...]] = ("block_size", "examples")

    def __init__(self, space: ParameterSpace, settings: BlockFisherSettings) -> None:
        super().__init__(space, settings)
        self._sizes = space.stretches(settings.block_size, across_tensors=settings.across_layers)
        strategy = KeptRows if settings.keeps_rows(max(self._sizes)) else KeptBlocks
        self._kept: KeptRows | KeptBlocks = strategy(space, settings, self._sizes)
        self._device: torch.device | None = None
        self._inverse: InverseFisher | None = None

    def update(self, objective: Objective, *, generator: torch.Generator) -> Mapping[str, float]:
        """Add the objective's examples, batch by batch."""
        settings, examples = self.settings, some(objective.count())
        if examples % settings.average:
            raise DataError(
                f"the data gave {examples} examples, which average={settings.average} does not divide: give "
                f"{examples // settings.average * settings.average or settings.average} or set estimator.average=1"
            )
        self._inverse = None
        rows = gradient_rows(objective, settings.fisher, generator=generator)
        rows = averaged_rows(rows, settings.average)
        self._device = objective.device
        count = self._kept.take(rows, examples // settings.average, objective)
        return {
            "mean_diagonal": self._kept.mean_diagonal,
            "examples": float(examples),
            "rows": float(count),
            "average": float(settings.average),
        }

    def adopt(self, state: Mapping[str, Tensor]) -> bool:
        """See the base; False where the kept statistics do not suit this damping."""
        return self._kept.adoptable(state) and super().adopt(state)

    def inverse(self, damping: float | None = None) -> InverseFisher:
        """Σ, from the rows or blocks."""
        if not self._kept.known:
            raise CurvatureError("the estimator has seen no examples; call update first")
        gamma = self.resolve_damping(damping, self._kept.mean_diagonal)
        if self._inverse is None or self._inverse.damping != gamma:  # later cuts with the same Σ share its factors
            self._inverse = InverseFisher(self._kept.operator(gamma, self._device), gamma)
        return self._inverse

    def state_dict(self) -> dict[str, Tensor]:
        """The rows or the blocks, once there are any."""
        found = self._kept.state_dict()
        mean = torch.tensor(self._kept.mean_diagonal, dtype=torch.float64, device=self._device)
        return found and {**found, "mean_diagonal": mean}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self._kept.load_state_dict(state)
        self._inverse = None
        if state:
            self._kept.mean_diagonal = float(state["mean_diagonal"])
            self._device = state["mean_diagonal"].device  # always the model's device, unlike that of the rows

    def state_device(self, name: str, tensor: Tensor, device: torch.device) -> torch.device:
        """As the kept rows or blocks say."""
        return self._kept.state_device(name, tensor, device)

    @classmethod
    def memory(cls, space: ParameterSpace, settings: BlockFisherSettings) -> int:
        """Bytes of rows and their Gram factors; or of statistics, precision, factor and inverse of the blocks.

        They are for a float32 model; in float64 rows take twice as much.
        """
        return cls._of_rows(space, settings) + cls._beside_rows(space, settings)

    @classmethod
    def _of_rows(cls, space: ParameterSpace, settings: BlockFisherSettings) -> int:
        sizes = space.stretches(settings.block_size, across_tensors=settings.across_layers)
        return KeptRows.bytes(space, settings) if settings.keeps_rows(max(sizes)) else 0

    @classmethod
    def _beside_rows(cls, space: ParameterSpace, settings: BlockFisherSettings) -> int:
        sizes = space.stretches(settings.block_size, across_tensors=settings.across_layers)
        if settings.keeps_rows(max(sizes)):
            return KeptRows.beside(space, settings, sizes)
        return KeptBlocks.bytes(space, settings, sizes)

    @classmethod
    def check(cls, model: nn.Module, space: ParameterSpace, settings: BlockFisherSettings, available: Memory) -> None:
        apart = settings.rows_on != "device" and available.device != available.host  # rows may lie on the host
        if not (apart and cls._of_rows(space, settings)) or (
            settings.rows_on == "auto" and cls.memory(space, settings) <= available.device
        ):
            super().check(model, space, settings, available)
            return
        cls.check_memory(available.host, settings, lambda given: cls._of_rows(space, given), space.size, "host memory")
        cls.check_memory(
            available.device, settings, lambda given: cls._beside_rows(space, given), space.size, "device memory"
        )
