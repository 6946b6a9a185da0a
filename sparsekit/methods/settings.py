"""The base class of all settings, and the settings that belong to no plugin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from typing_extensions import TypeVar

from sparsekit.methods.plain_values import as_number
from sparsekit.removal import Compensation

#: The class of a component's settings; Any where the component names none (`Saliency`, not `Saliency[OwnSettings]`).
SettingsT = TypeVar("SettingsT", bound=BaseModel, default=Any)


class Settings(BaseModel):
    """Frozen settings; unknown keys, numbers that are not finite, and true or false for a number are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, given: object, info: ValidationInfo) -> object:
        return as_number(cls.model_fields[str(info.field_name)].annotation, given)


class CompensationSettings(Settings):
    """How the kept weights move when others are removed; see `InverseFisher.remove`."""

    how: Literal[Compensation, "exact"] = Field(
        "joint",
        description="joint, independent (as most papers publish it), none, or exact: joint with the Gauss-Newton "
        "matrix of the whole network, which the estimator only preconditions",
    )
    first_order: float = Field(
        0.0,
        ge=0,
        le=1,
        description="weight of the gradient in the quadratic model; 0: a trained network's, zero",
    )
    scale: float = Field(1.0, ge=0, le=1, description="of the survivors' move; 1: the solution, 0: none")
    damping: float | None = Field(
        None,
        gt=0,
        description="γ of an exact solve, in units of the Fisher; by default the estimator's, which for identity and "
        "layer-wise estimators is in other units",
    )
    tolerance: float = Field(1e-2, gt=0, lt=1, description="relative residual at which an exact solve ends")
    max_iterations: int = Field(
        100, ge=1, description="products of an exact solve at most; one that ends so is listed as degraded"
    )


#: The default ridges of a reconstruction, relative to the mean of diag Â: docs/results/batch-norm.md.
RIDGE = 0.03
RIDGE_BEFORE_TRAINING = 0.3


class ReconstructionSettings(Settings):
    """How layers are fitted to their outputs in the dense network; see `reconstruction`."""

    how: Literal["none", "layerwise", "fisher"] = Field(
        "none",
        description="after a cut, fit each layer's survivors to its outputs in the dense network: not at all, all "
        "outputs alike, or weighted by their Fisher information",
    )
    examples: int = Field(
        1024,
        ge=1,
        description="training examples that are fitted, labels unused; by default as many as there are, at most 1024",
    )
    batch_size: int = Field(64, ge=1, description="examples in one pass")
    positions: int | None = Field(
        64, ge=1, description="drawn for each example and layer, of those that a weight is applied at; null: all"
    )
    ridge: float | None = Field(
        None,
        ge=0,
        description="towards the weights as they are, relative to the mean of diag Â; by default 0.3 where training "
        "follows, to which large weights are a burden, else 0.03",
    )
    norms: bool = Field(
        True,
        description="fit the bias of a batch normalisation that follows a layer without one, as if it were its own",
    )
    sweeps: int = Field(1, ge=1, description="times that all layers are fitted, one after the other")
    when: Literal["cut", "level"] = Field("cut", description="after every cut, or only where a level is reached")
    held_out: float = Field(0.125, ge=0, lt=1, description="fraction of the batches that fits are judged on")
    cache_mebibytes: int = Field(
        1024,
        ge=0,
        description="for activations that need not be computed again, on the device while there is room, else on the "
        "host; 0: none",
    )

    def with_ridge(self, trained: bool) -> Self:
        """These settings with a ridge: what was given, else the default with or without training after the fit."""
        if self.ridge is not None:
            return self
        return self.model_copy(update={"ridge": RIDGE_BEFORE_TRAINING if trained else RIDGE})

    @model_validator(mode="after")
    def _told_how(self) -> Self:
        if self.model_fields_set and "how" not in self.model_fields_set:
            raise ValueError("settings without `how` do nothing; set how=layerwise or fisher")
        return self


class BatchNormSettings(Settings):
    """The running statistics of batch normalisations after a cut and its reconstruction."""

    statistics: Literal["kept", "anew"] = Field(
        "kept",
        description="as they are in the dense network, or taken anew from training examples, as training mode will see "
        "them; a reconstruction then takes them anew after each layer that it fits",
    )
    examples: int = Field(
        1024, ge=2, description="training examples, labels unused; by default as many as there are, at most 1024"
    )
    batch_size: int = Field(64, ge=2, description="examples in one pass")


class FinetuneSettings(Settings):
    """Masked training with momentum SGD after a cut; the same for all compared methods."""

    epochs: float = Field(0.0, ge=0, description="passes over the training examples after each step; 0: none")
    learning_rate: float = Field(0.01, gt=0, description="at the beginning of each step")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD; cleared for removed weights")
    weight_decay: float = Field(5e-4, ge=0, description="L2, on all parameters that are trained")
    batch_size: int = Field(128, ge=1, description="examples in one optimiser step")
    decay: Literal["cosine", "constant", "stepwise"] = Field(
        "cosine", description="of the learning rate within one step; stepwise: a tenth after every decay_every epochs"
    )
    decay_every: float = Field(60.0, gt=0, description="epochs at each rate of a stepwise decay")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of forward and backward passes (autocast); weights and momentum stay in float32"
    )
    channels_last: bool = Field(False, description="whether weights and images of convolutions lie channels last")
    refine_every: int = Field(
        0,
        ge=0,
        description="optimiser steps after which the estimator is updated at the present weights; 0: only at cuts",
    )


@dataclass(frozen=True)
class Preset:
    """A published configuration that can be run by name.

    Attributes:
        name: `--preset NAME`.
        reference: the paper or code that states it.
        settings: of a run; all other given settings override them.
        differs: what differs from the publication, and why; empty where nothing does.
    """

    name: str
    reference: str
    settings: Mapping[str, object]
    differs: str = ""
