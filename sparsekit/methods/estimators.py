"""The built-in curvature estimators: identity and diagonal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sparsekit.curvature import fisher_diagonal, layer_gradients_memory
from sparsekit.errors import CurvatureError
from sparsekit.linalg import Diagonal
from sparsekit.methods.block_fisher import BlockFisher
from sparsekit.methods.block_settings import BlockFisherSettings
from sparsekit.methods.estimator import CurvatureEstimator, EstimatorSettings
from sparsekit.problem.objective import Objective
from sparsekit.problem.parameters import ParameterSpace
from sparsekit.removal import InverseFisher

__all__ = [
    "BlockFisher",
    "BlockFisherSettings",
    "DiagonalFisher",
    "DiagonalFisherSettings",
    "Identity",
    "IdentitySettings",
]


class IdentitySettings(EstimatorSettings):
    """Settings of `identity`."""

    examples: int = Field(
        0,
        ge=0,
        description="training examples that the loss is measured on before and after a cut; 0: none, but where "
        "something else takes them",
    )


class Identity(CurvatureEstimator[EstimatorSettings]):
    """F = I: every weight counts alike. OBS saliency with it is magnitude, and compensation moves nothing."""

    name: ClassVar[str] = "identity"
    Settings: ClassVar[type[EstimatorSettings]] = IdentitySettings

    @classmethod
    def unit(cls, settings: EstimatorSettings) -> Literal["loss", "other", "layer"]:
        """Other: squared weights."""
        return "other"

    def __init__(self, space: ParameterSpace, settings: EstimatorSettings) -> None:
        super().__init__(space, settings)
        self._like: Tensor | None = None

    def update(self, objective: Objective, *, generator: torch.Generator) -> Mapping[str, float]:
        """Store the device and dtype; there is nothing to estimate."""
        self._like = torch.empty(0, dtype=objective.dtype, device=objective.device)
        return {}

    def inverse(self, damping: float | None = None) -> InverseFisher:
        """Σ = I / (1 + γ)."""
        if self._like is None:
            raise CurvatureError("the estimator has seen no examples; call update first")
        gamma = self.resolve_damping(damping, 1.0)
        return InverseFisher(Diagonal(self._like.new_full((self.space.size,), 1 / (1 + gamma))), gamma)

    def state_dict(self) -> dict[str, Tensor]:
        """One empty tensor with the device and dtype, after an update."""
        return {} if self._like is None else {"like": self._like}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self._like = state.get("like")

    @classmethod
    def memory(cls, space: ParameterSpace, settings: EstimatorSettings) -> int:
        """Bytes of one vector."""
        return 4 * space.size


class DiagonalFisherSettings(EstimatorSettings):
    """Settings of `diagonal`."""

    decay: float = Field(
        0.0, ge=0, lt=1, description="weight of earlier estimates at a refresh; 0: each refresh starts afresh"
    )


class DiagonalFisher(CurvatureEstimator[DiagonalFisherSettings]):
    """Σ_ii = 1/(F_ii + γ). OBS on it is Optimal Brain Damage up to damping (LeCun et al., 1990)."""

    name: ClassVar[str] = "diagonal"
    Settings: ClassVar[type[EstimatorSettings]] = DiagonalFisherSettings

    def __init__(self, space: ParameterSpace, settings: DiagonalFisherSettings) -> None:
        super().__init__(space, settings)
        self._diagonal: Tensor | None = None

    def update(self, objective: Objective, *, generator: torch.Generator) -> Mapping[str, float]:
        """F_ii from the squares of gradients, mixed with the previous estimate by `decay`."""
        new = fisher_diagonal(objective, self.settings.fisher, generator=generator)
        old, decay = self._diagonal, self.settings.decay
        self._diagonal = new if old is None else decay * old + (1 - decay) * new
        return {"mean_diagonal": float(self._diagonal.double().mean())}

    def inverse(self, damping: float | None = None) -> InverseFisher:
        """Σ = diag(1/(F + γ))."""
        if self._diagonal is None:
            raise CurvatureError("the estimator has seen no examples; call update first")
        gamma = self.resolve_damping(damping, float(self._diagonal.double().mean()))
        return InverseFisher(Diagonal((self._diagonal + gamma).reciprocal()), gamma)

    def state_dict(self) -> dict[str, Tensor]:
        """The diagonal, after an update."""
        return {} if self._diagonal is None else {"diagonal": self._diagonal}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self._diagonal = state.get("diagonal")

    @classmethod
    def memory(cls, space: ParameterSpace, settings: DiagonalFisherSettings) -> int:
        """Bytes of the diagonal, of its sum in both precisions, and of the passes."""
        return space.size * (4 + 4 + 8) + layer_gradients_memory(space, settings.batch_size)
