"""Optimal Brain Surgeon, for sparsekit: on blocks of the Fisher, greedy, by groups."""

from collections.abc import Sequence

from sparsekit import CurvatureEstimator, Preset, Saliency, hookimpl
from sparsekit_obs.estimator import OptimalBrainSurgeon
from sparsekit_obs.layerwise import LayerwiseSurgeon
from sparsekit_obs.presets import PRESETS
from sparsekit_obs.saliencies import GreedySurgeon, GroupSurgeon


@hookimpl
def sparsekit_estimators() -> Sequence[type[CurvatureEstimator]]:
    """`obs` and `obs-layerwise`."""
    return [OptimalBrainSurgeon, LayerwiseSurgeon]


@hookimpl
def sparsekit_saliencies() -> Sequence[type[Saliency]]:
    """`obs-greedy` and `obs-group`."""
    return [GreedySurgeon, GroupSurgeon]


@hookimpl
def sparsekit_presets() -> Sequence[Preset]:
    """`obert`, `obert-block4`, `cap` and `obc`."""
    return PRESETS
