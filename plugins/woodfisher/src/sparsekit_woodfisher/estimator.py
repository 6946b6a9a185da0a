"""WoodFisher: the empirical Fisher on chunks of each layer, inverted."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from sparsekit import BlockFisher, BlockFisherSettings, EstimatorSettings


class WoodFisherSettings(BlockFisherSettings):
    """Settings of `woodfisher`. The paper's chunk size c is `block_size`, its Fisher mini-batch `average`."""

    block_size: int | None = Field(2000, ge=1, description="c, consecutive weights of a layer in one chunk; null: all")


class WoodFisher(BlockFisher):
    """WoodFisher on chunks of c consecutive weights of each layer.

    The published recursion Σ ← Σ − Σ g gᵀΣ/(m + gᵀΣg) over m rows, each the mean gradient of a mini-batch, ends at
    the inverse of γI + (1/m) Σ g gᵀ, which is what is inverted here: as a matrix where a chunk has no more weights
    than there are rows, through the m × m Gram matrix of its rows where it has more. What is removed is dropped:
    scores and updates see the surviving coordinates' matrix alone.

    One threshold for the network is `--pattern unstructured`, one for each layer `--pattern uniform`; the scaled
    update is `compensation.scale`; sampled labels are `estimator.fisher=sampled`.

    Reference: Singh and Alistarh, 2020.
    """

    name: ClassVar[str] = "woodfisher"
    Settings: ClassVar[type[EstimatorSettings]] = WoodFisherSettings
    memory_settings: ClassVar[tuple[str, ...]] = ("examples", "block_size")
