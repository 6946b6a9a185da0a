"""Second-order pruning of neural networks."""

from sparsekit.api import Pruned, prune
from sparsekit.curvature.rows import FisherKind
from sparsekit.errors import (
    CurvatureError,
    DataError,
    ModelError,
    PluginError,
    RecordError,
    SettingsError,
    SparsekitError,
)
from sparsekit.hookspecs import hookimpl
from sparsekit.interfaces import (
    CurvatureEstimator,
    EstimatorSettings,
    FinetuneSettings,
    Pattern,
    Saliency,
    Schedule,
    Settings,
    Task,
    TaskSettings,
)
from sparsekit.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from sparsekit.objective import Objective
from sparsekit.parameters import Mask, ParameterSpace
from sparsekit.removal import InverseFisher, Removal

__all__ = [
    "Bernoulli",
    "Categorical",
    "CurvatureError",
    "CurvatureEstimator",
    "DataError",
    "EstimatorSettings",
    "FinetuneSettings",
    "FisherKind",
    "Gaussian",
    "InverseFisher",
    "Likelihood",
    "Mask",
    "ModelError",
    "Objective",
    "ParameterSpace",
    "Pattern",
    "PluginError",
    "Pruned",
    "RecordError",
    "Removal",
    "Saliency",
    "Schedule",
    "Settings",
    "SettingsError",
    "SparsekitError",
    "Task",
    "TaskSettings",
    "hookimpl",
    "prune",
]
