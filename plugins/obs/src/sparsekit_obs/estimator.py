"""The block-diagonal Fisher, inverted exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sparsekit import (
    CurvatureError,
    CurvatureEstimator,
    EstimatorSettings,
    FisherKind,
    InverseFisher,
    Objective,
    ParameterSpace,
)
from sparsekit.curvature import gradient_rows
from sparsekit.linalg import BlockDiagonal


class BlockFisherSettings(EstimatorSettings):
    """Settings of `obs`; the defaults of oBERT (Kurtic et al., 2022) except where noted.

    The published damping is 1e-7 (absolute), with an advised grid of 1e-4 … 1e-8 and batched gradients.
    """

    fisher: FisherKind = Field("empirical", description="the data's own labels, as published; or sampled, exact")
    block_size: int = Field(50, ge=1, description="B, consecutive weights of a tensor in one block")
    decay: float = Field(0.0, ge=0, lt=1, description="weight of earlier estimates at a refresh; 0: starts afresh")


class BlockFisher(CurvatureEstimator):
    """OBS on consecutive blocks of B weights inside each tensor: H_b = (1/N) Σ g_b g_bᵀ + γI.

    What is kept is Σ g gᵀ, not its inverse, so that another damping or a mask costs one batched Cholesky
    factorisation in float64. The same matrix as the published rank-one recursion from I/γ, but symmetric by
    construction.

    Reference: Kurtic et al., 2022 (oBERT); Hassibi and Stork, 1993.
    """

    name: ClassVar[str] = "obs"
    Settings: ClassVar[type[EstimatorSettings]] = BlockFisherSettings

    def __init__(self, space: ParameterSpace, settings: BlockFisherSettings) -> None:
        super().__init__(space, settings)
        self._blocks: Tensor | None = None
        self._sizes = block_sizes(space, settings.block_size)

    def update(self, objective: Objective, *, generator: torch.Generator) -> Mapping[str, float]:
        """Σ g gᵀ in every block over all rows, accumulated in float64; mixed with earlier ones by `decay`."""
        width = max(self._sizes)
        inside = torch.arange(width) < torch.tensor(self._sizes)[:, None]  # (m, B)
        inside = inside.to(objective.device)
        total = torch.zeros(*inside.shape, width, dtype=torch.float64, device=objective.device)
        for rows in gradient_rows(objective, self.settings.fisher, generator=generator):
            blocked = rows.new_zeros(len(rows), *inside.shape)
            blocked[:, inside] = rows
            blocked = blocked.movedim(0, 1)  # (m, b, B)
            total += blocked.mT @ blocked
        new = total / objective.count()
        old, decay = self._blocks, self.settings.decay
        self._blocks = new if old is None else decay * old + (1 - decay) * new
        return {"mean_diagonal": self._mean_diagonal(self._blocks)}

    def _mean_diagonal(self, blocks: Tensor) -> float:
        return float(blocks.diagonal(dim1=1, dim2=2).sum() / self.space.size)

    def inverse(self, damping: float | None = None) -> InverseFisher:
        """Σ by batched Cholesky factorisation."""
        if self._blocks is None:
            raise CurvatureError("the estimator has seen no examples; call update first")
        gamma = self.resolve_damping(damping, self._mean_diagonal(self._blocks))
        eye = torch.eye(self._blocks.shape[1], dtype=self._blocks.dtype, device=self._blocks.device)
        return InverseFisher(BlockDiagonal(self._blocks + gamma * eye, self._sizes), gamma)

    def state_dict(self) -> dict[str, Tensor]:
        """The blocks, once there are any."""
        return {} if self._blocks is None else {"blocks": self._blocks}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self._blocks = state.get("blocks")

    @classmethod
    def memory(cls, space: ParameterSpace, settings: Any) -> int:
        """Statistics, precision, factor and inverse in float64, and one batch of rows."""
        sizes = block_sizes(space, settings.block_size)
        return len(sizes) * max(sizes) ** 2 * 8 * 5 + space.size * 4 * settings.batch_size * 3


def block_sizes(space: ParameterSpace, block_size: int) -> list[int]:
    """Lengths of the blocks in flat order; none crosses a tensor's end, so a tensor's last may be short."""
    sizes = []
    for info in space.parameters:
        whole, rest = divmod(info.size, block_size)
        sizes += [block_size] * whole + [rest] * (rest > 0)
    return sizes
