"""FishLeg: the inverse Fisher, learned and refined as pruning proceeds, for sparsekit."""

from collections.abc import Sequence

from sparsekit import CurvatureEstimator, hookimpl
from sparsekit_fishleg.estimator import FishLeg
from sparsekit_fishleg.structures import View, structure_of

__all__ = ["FishLeg", "View", "structure_of"]


@hookimpl
def sparsekit_estimators() -> Sequence[type[CurvatureEstimator]]:
    """`fishleg`."""
    return [FishLeg]
