"""The settings of estimators on blocks of the Fisher."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sparsekit.curvature.vectors import FisherKind
from sparsekit.methods.estimator import EstimatorSettings


class BlockFisherSettings(EstimatorSettings):
    """Settings of estimators on blocks of the Fisher."""

    fisher: FisherKind = Field("empirical", description="the data's own labels, as published; or importance, …")
    block_size: int | None = Field(50, ge=1, description="B, consecutive weights in one block; null: as long as can be")
    across_layers: bool = Field(False, description="whether a block may cross the end of a tensor")
    average: int = Field(
        1, ge=1, description="b, examples whose gradients are averaged to one row; must divide examples"
    )
    store: Literal["auto", "rows", "blocks"] = Field(
        "auto", description="what is kept: all m rows, or B × B blocks; auto: rows where m < B"
    )
    rows_on: Literal["auto", "device", "host"] = Field(
        "auto",
        description="where rows lie; paged in from the host; auto: host where the device is too small",
    )
    decay: float = Field(
        0.0, ge=0, lt=1, description="weight of earlier estimates at a refresh (blocks only); 0: starts afresh"
    )

    @model_validator(mode="after")
    def _consistent(self) -> BlockFisherSettings:
        if "examples" in self.model_fields_set and self.examples % self.average:
            fits = max(self.examples // self.average, 1) * self.average
            raise ValueError(f"average={self.average} must divide examples={self.examples}; examples={fits} would do")
        if self.fisher == "exact" and (self.average > 1 or self.store == "rows"):
            raise ValueError("the exact Fisher has several rows an example: use average=1 and store=blocks or auto")
        if self.decay and self.store == "rows":
            raise ValueError("rows start afresh at a refresh: use decay=0 or store=blocks")
        return self

    def fitting(self, available: int) -> int:
        """Whole rows of `average` examples."""
        return available // self.average * self.average

    @property
    def rows(self) -> int:
        """The number of rows of one estimate, m (for one row an example)."""
        return self.examples // self.average

    def keeps_rows(self, longest: int) -> bool:
        """Whether rows are kept rather than blocks, `longest` being the longest block."""
        if self.store == "auto":
            return self.fisher != "exact" and not self.decay and self.rows < longest
        return self.store == "rows"

    def batch_bytes(self, weights: int) -> int:
        """Bytes of the rows of one batch while they are computed, for a float32 model."""
        return weights * 4 * self.batch_size * (3 if self.average == 1 else 6)
