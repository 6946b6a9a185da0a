"""FishLeg: the inverse Fisher, learned and refined as pruning proceeds, for sparsekit."""

from collections.abc import Sequence

from sparsekit import CurvatureEstimator, hookimpl
from sparsekit_fishleg.estimator import FishLeg


@hookimpl
def sparsekit_estimators() -> Sequence[type[CurvatureEstimator]]:
    """`fishleg`."""
    return [FishLeg]
