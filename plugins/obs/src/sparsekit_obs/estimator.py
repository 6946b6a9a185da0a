"""Optimal Brain Surgeon on blocks of the Fisher."""

from __future__ import annotations

from typing import ClassVar

from sparsekit import BlockFisher


class OptimalBrainSurgeon(BlockFisher):
    """OBS on consecutive blocks of B weights inside each tensor, B = 50 unless told otherwise.

    With block_size=null and across_layers=true it is exact dense OBS, for small networks.

    Reference: Hassibi and Stork, 1993; Kurtic et al., 2022 (oBERT).
    """

    name: ClassVar[str] = "obs"
