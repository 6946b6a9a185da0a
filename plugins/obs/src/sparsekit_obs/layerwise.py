"""Optimal Brain Surgeon on the least squares of each layer's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sparsekit import (
    CurvatureError,
    CurvatureEstimator,
    EstimatorSettings,
    InverseFisher,
    Memory,
    Objective,
    ParameterSpace,
)
from sparsekit.curvature import input_moments, inputs, layer_groups
from sparsekit.linalg import DirectSum, RepeatedBlock


class LayerwiseSettings(EstimatorSettings):
    """Settings of `obs-layerwise`."""

    damping: float = Field(0.01, gt=0, description="γ, added to each layer's Hessian")
    damping_scale: Literal["absolute", "relative"] = Field(
        "relative", description="relative: γ is `damping` times the mean of each layer's own diagonal"
    )
    slice_mebibytes: int = Field(256, ge=1, description="memory for rows whose systems are solved at a time")


class LayerwiseSurgeon(CurvatureEstimator):
    """H = 2 E XXᵀ for the loss ‖WX − ŴX‖² of each layer's outputs: rows of W do not couple and share H.

    No labels and no gradients are used. Scores compare within a layer only, so the pattern must not compare
    layers. Greedy elimination row by row, its costs sorted within the layer, is the saliency `obs-greedy` with a
    `block_size` of at least the inputs of a row. Inputs that are always zero are decoupled and go first.

    Reference: Dong, Chen and Pan, 2017 (L-OBS); Frantar and Alistarh, 2022 (ExactOBS).
    """

    name: ClassVar[str] = "obs-layerwise"
    Settings: ClassVar[type[EstimatorSettings]] = LayerwiseSettings
    across_layers: ClassVar[bool] = False
    memory_settings: ClassVar[tuple[str, ...]] = ("slice_mebibytes",)

    #: Of γ, for inputs that are always zero: small beside any live one, and safe to divide by.
    DEAD = 1e-6

    def __init__(self, space: ParameterSpace, settings: LayerwiseSettings) -> None:
        super().__init__(space, settings)
        self._moments: dict[str, Tensor] = {}

    def update(self, objective: Objective, *, generator: torch.Generator) -> Mapping[str, float]:
        """Take the inputs of every layer afresh, at the present weights."""
        self._moments = {}  # freed before as much again is allocated
        self._moments = {name: moment.mul_(2) for name, moment in input_moments(objective).items()}
        dead = sum(int((moment.diagonal(dim1=1, dim2=2) == 0).sum()) for moment in self._moments.values())
        return {"dead_inputs": float(dead)}

    def inverse(self, damping: float | None = None) -> InverseFisher:
        """Σ, a block for each row; `damping` is absolute."""
        if not self._moments:
            raise CurvatureError("the estimator has seen no examples; call update first")
        parts, used = [], 0.0
        for info in self.space.parameters:
            moment = self._moments[info.name]
            diagonal = moment.diagonal(dim1=1, dim2=2)
            gamma = self.resolve_damping(damping, float(diagonal.mean()))
            added = torch.where(diagonal == 0, self.DEAD * gamma, gamma)
            repeats = info.size // (len(moment) * moment.shape[1])
            slice_bytes = self.settings.slice_mebibytes << 20
            parts.append(RepeatedBlock(moment + torch.diag_embed(added), repeats, slice_bytes=slice_bytes))
            used += gamma * info.size / self.space.size
        return InverseFisher(DirectSum(parts), used)

    def state_dict(self) -> dict[str, Tensor]:
        """The layers' Hessians, once there are any."""
        return dict(self._moments)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self._moments = dict(state)

    @classmethod
    def memory(cls, space: ParameterSpace, settings: Any) -> int:
        """Hessian, precision and inverse of each layer, a slice of rows, and patches; of groups only `check` knows."""
        return cls._needed(space, settings, {})

    @staticmethod
    def _needed(space: ParameterSpace, settings: Any, groups: Mapping[str, int]) -> int:
        matrices, largest = 0, 0
        for info in space.parameters:
            count, width = groups.get(info.name, 1), info.size // info.shape[0]
            one, rows = 8 * width**2, info.shape[0] // count
            matrices += 3 * count * one
            fitting = max(1, (settings.slice_mebibytes << 20) // (4 * one))
            largest = max(largest, 2 * count * one, 4 * min(fitting, rows) * one)
        return matrices + largest + 3 * inputs.PATCH_BYTES + 4 * 8 * space.size

    @classmethod
    def check(cls, model: nn.Module, space: ParameterSpace, settings: Any, available: Memory) -> None:
        groups = layer_groups(model, space)
        cls._check_memory(available.device, settings, lambda given: cls._needed(space, given, groups), space.size)
