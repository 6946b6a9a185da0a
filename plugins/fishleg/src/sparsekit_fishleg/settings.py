"""The settings of FishLeg."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sparsekit import EstimatorSettings
from sparsekit_fishleg.structures import Structure


class FishLegSettings(EstimatorSettings):
    """Settings of `fishleg`."""

    examples: int = Field(
        1024, ge=2, description="calibration examples for each estimate; by default as many as there are, at most 1024"
    )
    structure: Structure = Field(
        "eigenbasis",
        description="eigenbasis: two factors with an inner diagonal; kronecker: two factors; outer: those with an "
        "outer diagonal; frozen: eigenbasis, of which only the diagonal is trained; three-factor: outputs, inputs and "
        "kernel of a convolution; blocks: a dense block for each output; dense: one for each tensor; diagonal",
    )
    start: Literal["eigenbasis", "identity"] = Field(
        "eigenbasis", description="of the fit: the closed form in the Kronecker eigenbasis, or I/γ"
    )
    refresh: Literal["moments", "auxiliary"] = Field(
        "moments",
        description="later updates: assimilate new moments in closed form, then refine; or auxiliary steps alone, in "
        "which Adam goes on where it was, at the damping of the first update",
    )
    decay: float = Field(
        0.2, ge=0, lt=1, description="weight of what was known when new moments are assimilated; 0: afresh"
    )
    spectrum: Literal["same", "others"] = Field(
        "same",
        description="the spectrum is measured on the examples that the bases come from, or bases come from the first "
        "half of the batches and the spectrum from the others: in one sample its last entries come out too small",
    )
    auxiliary_steps: int = Field(0, ge=0, description="at most so many for each update, not counting undone ones")
    start_examples: int | None = Field(
        None,
        ge=1,
        description="examples of the closed form, in whole batches; auxiliary steps then take fresh ones, a batch of "
        "the others each; null: all examples for both",
    )
    auxiliary_learning_rate: float = Field(1e-3, gt=0, description="Adam's, on log q and on relative factors")
    probes: int = Field(8, ge=1, description="Gaussian u for each auxiliary step")
    check_every: int = Field(5, ge=1, description="auxiliary steps between looks at the held-out residual")
    held_out: float = Field(0.1, gt=0, lt=1, description="fraction of the batches, one at least, for that residual")
    preconditioned: bool = Field(True, description="weight the residual by Q, so that all directions learn alike")
    products: Literal["layer", "network"] = Field(
        "layer", description="Fisher products within layers, or exact Gauss-Newton products of the network"
    )
    diagnostics: bool = Field(
        False, description="hold out examples, and report for each tensor what `FishLeg.update` says it returns"
    )
    max_factor: int = Field(5120, ge=1, description="longer sides of a tensor are taken coordinate by coordinate")
    dense_below: int = Field(
        0, ge=0, description="weights of at most so many, of layers with a rule, get one dense block"
    )
    state_mebibytes: int | None = Field(
        None, ge=1, description="bound of the state: longer sides lose their factors until it holds; null: none"
    )

    @model_validator(mode="after")
    def _steps_where_they_are_needed(self) -> Self:
        for name, value in (("refresh", "auxiliary"), ("start", "identity")):
            if getattr(self, name) == value and not self.auxiliary_steps:
                raise ValueError(f"{name}={value} learns by auxiliary steps; set auxiliary_steps, 20 for example")
        if self.start_examples is not None and not self.auxiliary_steps:
            raise ValueError("start_examples leaves the others to auxiliary steps; set auxiliary_steps, 20 for example")
        return self

    @property
    def carries(self) -> bool:
        """Whether Adam's moments are kept from one update to the next."""
        return self.refresh == "auxiliary" and self.auxiliary_steps > 0

    def held_out_batches(self, batches: int) -> int:
        """The number of calibration batches that are held out to judge Q; 0 where nothing is judged."""
        judged = self.auxiliary_steps or self.diagnostics
        return max(1, round(self.held_out * batches)) if judged else 0
