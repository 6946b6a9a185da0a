"""M-FAC, the matrix-free inverse Fisher, for sparsekit."""

from collections.abc import Sequence

from sparsekit import CurvatureEstimator, Preset, hookimpl
from sparsekit_mfac.estimator import MFAC
from sparsekit_mfac.presets import PRESETS


@hookimpl
def sparsekit_estimators() -> Sequence[type[CurvatureEstimator]]:
    """`mfac`."""
    return [MFAC]


@hookimpl
def sparsekit_presets() -> Sequence[Preset]:
    """`mfac` and `mfac-sparseml`."""
    return PRESETS
