"""Optimal Brain Surgeon on the least squares of each layer's outputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import ClassVar, Literal

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
from sparsekit.curvature import (
    RunningSum,
    SharedSum,
    input_moments,
    input_moments_memory,
    layer_gradients,
    layer_gradients_memory,
    layer_groups,
)
from sparsekit.linalg import DirectSum, LinearOperator, RepeatedBlock, Rescaled


class LayerwiseSettings(EstimatorSettings):
    """Settings of `obs-layerwise`."""

    damping: float = Field(0.01, gt=0, description="γ, added to each layer's Hessian")
    damping_scale: Literal["absolute", "relative"] = Field(
        "relative", description="relative: γ is `damping` times the mean of each layer's own diagonal"
    )
    allocation: Literal["layer", "error", "fisher"] = Field(
        "layer",
        description="units of the scores. layer: each layer's own squared error, for patterns that compare within "
        "layers; error: the share of its squared output; fisher: the loss, by the Fisher information of each output",
    )
    slice_mebibytes: int = Field(256, ge=1, description="memory for rows whose systems are solved at a time")


class LayerwiseSurgeon(CurvatureEstimator[LayerwiseSettings]):
    """H = 2 E XXᵀ for the loss ‖WX − ŴX‖² of each layer's outputs: rows of W do not couple and share H.

    No labels and no gradients are used, and scores compare within a layer only, so that the pattern must not compare
    layers; unless an allocation gives every row r of a layer a factor b_r. 'error': b = 1 / E ‖WX‖², a cut's share of
    the layer's output. 'fisher': b_r = E ‖g_r‖² / tr H with g the gradient rows of the Fisher, so that b_r H has the
    trace of the Fisher's block of that row.

    Greedy elimination row by row, its costs sorted within the layer, is the saliency `obs-greedy` with a `block_size`
    of at least the inputs of a row. Inputs that are always zero are decoupled and go first.

    Reference: Dong, Chen and Pan, 2017 (L-OBS); Frantar and Alistarh, 2022 (ExactOBS).
    """

    name: ClassVar[str] = "obs-layerwise"
    Settings: ClassVar[type[EstimatorSettings]] = LayerwiseSettings
    memory_settings: ClassVar[tuple[str, ...]] = ("slice_mebibytes",)
    #: Of the kit: problems whose weights are all layers' own.
    conformance: ClassVar[Mapping[str, object]] = {
        "problems": ("mlp", "grouped", "tied", "no_bias", "bernoulli", "gaussian"),
        "waived": {"large_damping": "a relative γ is of each layer's own diagonal: γΣ tends to I layer by layer"},
    }

    #: Of γ, for inputs that are always zero: small beside any live one, and safe to divide by.
    DEAD = 1e-6

    #: Of the largest factor b, for outputs without any Fisher information, which cost nothing to lose.
    LEAST = 1e-6

    def __init__(self, space: ParameterSpace, settings: LayerwiseSettings) -> None:
        super().__init__(space, settings)
        self._moments: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}  # b, (out,), by name; empty without an allocation

    @classmethod
    def unit(cls, settings: LayerwiseSettings) -> Literal["loss", "other", "layer"]:
        """With an allocation, layers are comparable; never in units of the loss, because γ is relative to each H."""
        return "layer" if settings.allocation == "layer" else "other"

    def update(self, objective: Objective, *, generator: torch.Generator) -> Mapping[str, float]:
        """Compute the moments of every layer's inputs at the present weights; earlier ones are dropped."""
        self._moments = {}  # freed before as much again is allocated
        self._moments = {name: moment.mul_(2) for name, moment in input_moments(objective).items()}
        self._factors = self._allocated(objective, generator)
        dead = sum(int((moment.diagonal(dim1=1, dim2=2) == 0).sum()) for moment in self._moments.values())
        return {"dead_inputs": float(dead)}

    def _allocated(self, objective: Objective, generator: torch.Generator) -> dict[str, Tensor]:
        """See the class."""
        traces = {name: moment.diagonal(dim1=1, dim2=2).sum(1) for name, moment in self._moments.items()}  # (g,)
        found = {}
        if self.settings.allocation == "error":
            for name, w in self.space.unflatten(self.space.read(objective.model)).items():
                moment = self._moments[name]
                W = w.double().view(len(moment), -1, moment.shape[1])
                energy = (W @ moment * W).sum() / 2
                found[name] = torch.full((w.shape[0],), 1 / max(float(energy), 1e-300)).to(moment)
        if self.settings.allocation == "fisher":
            lengths: defaultdict[str, RunningSum] = defaultdict(SharedSum)
            for gradients in layer_gradients(objective, self.settings.fisher, generator=generator, shared=True):
                for name, one in gradients.items():
                    one.add_squared_norms(lengths[name])
            for name, total in lengths.items():
                trace = traces[name].clamp_min(1e-300)[:, None]
                b = total.mean(objective.count()).view(len(trace), -1) / trace
                found[name] = b.clamp_min(self.LEAST * float(b.max()) or 1.0).flatten()
        return found

    def why_zero(self) -> str:
        return "a layer's inputs are all zero; exclude it, or set damping_scale='absolute'"

    def inverse(self, damping: float | None = None) -> InverseFisher:
        """Σ, a block for each row; `damping` is absolute, and that of H before any factor b."""
        if not self._moments:
            raise CurvatureError("the estimator has seen no examples; call update first")
        parts: list[LinearOperator] = []
        used = 0.0
        for info in self.space.parameters:
            moment = self._moments[info.name]
            diagonal = moment.diagonal(dim1=1, dim2=2)
            gamma = self.resolve_damping(damping, float(diagonal.mean()))
            added = torch.where(diagonal == 0, self.DEAD * gamma, gamma)
            repeats = info.size // (len(moment) * moment.shape[1])
            slice_bytes = self.settings.slice_mebibytes << 20
            part: LinearOperator = RepeatedBlock.of_precision(
                moment + torch.diag_embed(added), repeats, slice_bytes=slice_bytes
            )
            b = self._factors.get(info.name)
            if b is not None:
                part = Rescaled(part, b.rsqrt().repeat_interleave(moment.shape[1]))
            parts.append(part)
            used += gamma * info.size / self.space.size
        return InverseFisher(DirectSum(parts), used)

    def state_dict(self) -> dict[str, Tensor]:
        """The layers' Hessians, and the factors of their rows if there are any."""
        return self._moments | {f"factor.{name}": b for name, b in self._factors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self._factors = {k.removeprefix("factor."): b for k, b in state.items() if k.startswith("factor.")}
        self._moments = {name: moment for name, moment in state.items() if not name.startswith("factor.")}

    @classmethod
    def memory(cls, space: ParameterSpace, settings: LayerwiseSettings) -> int:
        """Hessian, precision and inverse of each layer, a slice of rows, and patches; of groups only `check` knows."""
        return cls._needed(space, settings, {})

    @staticmethod
    def _needed(space: ParameterSpace, settings: LayerwiseSettings, groups: Mapping[str, int]) -> int:
        matrices, largest = 0, 0
        for info in space.parameters:
            count, width = groups.get(info.name, 1), info.size // info.shape[0]
            one, rows = 8 * width**2, info.shape[0] // count
            matrices += 3 * count * one
            fitting = max(1, (settings.slice_mebibytes << 20) // (4 * one))
            largest = max(largest, 2 * count * one, 4 * min(fitting, rows) * one)
        passes = layer_gradients_memory(space, settings.batch_size) if settings.allocation == "fisher" else 0
        return matrices + max(largest, passes) + input_moments_memory() + 4 * 8 * space.size

    @classmethod
    def check(cls, model: nn.Module, space: ParameterSpace, settings: LayerwiseSettings, available: Memory) -> None:
        groups = layer_groups(model, space)
        cls.check_memory(available.device, settings, lambda given: cls._needed(space, given, groups), space.size)
