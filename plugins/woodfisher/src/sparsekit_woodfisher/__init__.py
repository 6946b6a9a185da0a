"""WoodFisher and WoodTaylor, for sparsekit."""

from collections.abc import Sequence

from sparsekit import CurvatureEstimator, Preset, Saliency, hookimpl
from sparsekit_woodfisher.estimator import WoodFisher
from sparsekit_woodfisher.presets import PRESETS
from sparsekit_woodfisher.saliencies import WoodTaylor


@hookimpl
def sparsekit_estimators() -> Sequence[type[CurvatureEstimator]]:
    """`woodfisher`."""
    return [WoodFisher]


@hookimpl
def sparsekit_saliencies() -> Sequence[type[Saliency]]:
    """`woodtaylor`."""
    return [WoodTaylor]


@hookimpl
def sparsekit_presets() -> Sequence[Preset]:
    """`woodfisher-resnet20`, `woodfisher-resnet50`, `woodfisher-mobilenet` and `woodtaylor`."""
    return PRESETS
