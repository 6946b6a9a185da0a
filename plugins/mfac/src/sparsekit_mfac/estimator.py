"""Static M-FAC: (γI + GᵀG/m)⁻¹ from m gradient rows, without forming it."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from sparsekit import BlockFisher, BlockFisherSettings, EstimatorSettings


class MFACSettings(BlockFisherSettings):
    """Settings of `mfac`: the whole network in one block unless told otherwise."""

    block_size: int | None = Field(None, ge=1, description="B, consecutive weights in one block; null: all weights")
    across_layers: bool = Field(True, description="whether a block may cross the end of a tensor, as published")


class MFAC(BlockFisher):
    """M-FAC in its static form: O(mP) memory and time for a product, the whole network at once or in blocks.

    The published algorithm takes the recursion Σ ← Σ − Σ g gᵀΣ/(m + gᵀΣg) through m²/2 passes over a row; one
    Cholesky factor of γmI + GGᵀ gives the same Σ several times faster, and in float64, where the recursion in
    float32 has negative diagonals at small damping. Joint removal is in closed form.

    Reference: Frantar, Kurtic and Alistarh, 2021.
    """

    name: ClassVar[str] = "mfac"
    Settings: ClassVar[type[EstimatorSettings]] = MFACSettings
    memory_settings: ClassVar[tuple[str, ...]] = ("examples", "block_size")
