"""The schema of `record.json`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sparsekit.reconstruction.fit import LayerFit

#: Incremented with each change of a field's name, meaning or unit; part of every run's identity.
SCHEMA_VERSION = 1


class _Schema(BaseModel):
    # Strict JSON has no infinity: it is written as the string "Infinity" and read back as a float.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", from_attributes=True)


class ReconstructionRecord(_Schema):
    """The results of the reconstruction after a cut."""

    increase: float = Field(description="of the mean loss on the calibration examples; mostly negative")
    layers: list[LayerFit] = Field(description="in the order in which they were fitted")
    left: dict[str, str] = Field(description="weights that are as the cut left them, and why")


class LevelRecord(_Schema):
    """The results at one level."""

    sparsity: float = Field(description="asked for, as a fraction of the prunable weights")
    achieved: float = Field(description="removed, as a fraction of the prunable weights")
    achieved_total: float = Field(description="removed, as a fraction of all parameters of the model")
    pruned: dict[str, float] = Field(description="metrics after the cut and reconstruction, before fine-tuning")
    finetuned: dict[str, float] | None = Field(description="metrics after fine-tuning; null: there was none")
    predicted_increase: float = Field(description="of the mean loss per example, by the quadratic model")
    measured_increase: float = Field(description="of the mean loss per example, over the same cuts")
    reconstructed_increase: float = Field(default=0.0, description="of the same loss, by the reconstructions")
    layer_sparsity: dict[str, float] = Field(description="fraction removed, by parameter name")


class StepRecord(_Schema):
    """The results of one step, with the fields of the event `StepCompleted`."""

    index: int = Field(ge=0, description="from 0, over the whole run")
    sparsity: float = Field(description="after the step, as a fraction of the prunable weights")
    removed: int = Field(ge=0, description="weights removed in all after the step")
    refreshed: bool = Field(description="whether the curvature was estimated anew for this step")
    curvature: dict[str, float] = Field(description="the figures that the estimator returned")
    damping: float = Field(description="γ in units of the Fisher")
    predicted_increase: float = Field(description="of the mean loss per example, by the quadratic model")
    measured_increase: float = Field(description="of the mean loss on the calibration examples")
    iterations: int = Field(ge=0, description="of conjugate gradients; 0 where the removal was direct")
    residual: float = Field(description="relative, at the end of conjugate gradients")
    reconstruction: ReconstructionRecord | None = Field(default=None, description="null: there was none")
    batch_norm_increase: float | None = Field(
        default=None, description="of the same loss, by new batch norm statistics; null: they were kept"
    )
    pruned: dict[str, float] | None = Field(description="metrics after the cut and reconstruction; null: not measured")
    finetuned: dict[str, float] | None = Field(description="metrics after fine-tuning; null: there was none")
    seconds: dict[str, float] = Field(description="wall-clock time, by part of the step")


class RunRecord(_Schema):
    """The whole of `record.json`: the run, its machine and its results."""

    schema_version: int = SCHEMA_VERSION
    key: str = Field(description="SHA-256 of the identity, in hexadecimal")
    task: str
    estimator: str
    settings: dict[str, Any] = Field(description="resolved: every default written out")
    identity: dict[str, object] = Field(description="everything that was hashed into the key")
    started: str = Field(description="ISO 8601, UTC")
    finished: str | None = Field(default=None, description="ISO 8601, UTC; null while running")
    machine: dict[str, str] = Field(description="python, torch, platform, processor, threads, device")
    plugins: list[dict[str, str]] = Field(description="name and version of each plugin used")
    parameters: dict[str, Any] = Field(description="prunable, total, and why each other one is skipped")
    structures: dict[str, str] = Field(
        default_factory=dict, description="name of a parameter -> how its curvature is modelled, where that differs"
    )
    path: Literal["independent", "sequential"] = Field(
        description="independent: each level starts from the dense network; sequential: from the level before"
    )
    dense: dict[str, float] = Field(description="metrics of the dense network")
    levels: list[LevelRecord] = Field(default_factory=list)
    steps: list[StepRecord] = Field(default_factory=list)
    seconds: dict[str, float] = Field(default_factory=dict, description="wall-clock time, by part of the run")
    peak_memory_bytes: int = Field(default=0, ge=0, description="the largest resident or device memory seen")
    degraded: list[str] = Field(default_factory=list, description="what was permitted to go less well")
    status: Literal["running", "finished"] = "running"
    files: dict[str, str] = Field(
        default_factory=dict, description="SHA-256 of the files beside a finished record, by name"
    )


def run_key(identity: Mapping[str, object]) -> str:
    """SHA-256 of an identity's canonical JSON: keys sorted, no white space; 64 hexadecimal digits."""
    content = plain(identity, finite_only=True)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: object, *, finite_only: bool = False) -> object:
    """Mappings and sequences as dict and list; with `finite_only`, non-finite floats as strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(item, finite_only=finite_only) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, finite_only=finite_only) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and finite_only and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"settings and identities are plain data; {type(value).__name__} given: {value!r}")
