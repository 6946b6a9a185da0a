"""Optimal Brain Surgeon on blocks of the Fisher, for sparsekit."""

from collections.abc import Sequence

from sparsekit import CurvatureEstimator, hookimpl
from sparsekit_obs.estimator import BlockFisher


@hookimpl
def sparsekit_estimators() -> Sequence[type[CurvatureEstimator]]:
    """`obs`."""
    return [BlockFisher]
