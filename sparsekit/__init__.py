"""Second-order pruning of neural networks."""

from sparsekit import _moved
from sparsekit.api import Pruned, prune
from sparsekit.curvature.vectors import FisherKind
from sparsekit.errors import (
    CurvatureError,
    DataError,
    DegradedWarning,
    ModelError,
    PluginError,
    RecordError,
    SettingsError,
    SparsekitError,
)
from sparsekit.machine import Memory
from sparsekit.methods.estimators import BlockFisher, BlockFisherSettings
from sparsekit.methods.interfaces import (
    CompensationSettings,
    CurvatureEstimator,
    EstimatorSettings,
    FinetuneSettings,
    Pattern,
    Preset,
    Saliency,
    Schedule,
    ScoreContext,
    Settings,
    Task,
    TaskSettings,
    Units,
)
from sparsekit.problem.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from sparsekit.problem.objective import Objective
from sparsekit.problem.parameters import Mask, ParameterInfo, ParameterSpace
from sparsekit.pruning.keeping import Kept, check, keep
from sparsekit.registry.hookspecs import hookimpl
from sparsekit.removal import InverseFisher, Removal

_moved.install()
__getattr__ = _moved.attribute

__all__ = [
    "Bernoulli",
    "BlockFisher",
    "BlockFisherSettings",
    "Categorical",
    "CompensationSettings",
    "CurvatureError",
    "CurvatureEstimator",
    "DataError",
    "DegradedWarning",
    "EstimatorSettings",
    "FinetuneSettings",
    "FisherKind",
    "Gaussian",
    "InverseFisher",
    "Kept",
    "Likelihood",
    "Mask",
    "Memory",
    "ModelError",
    "Objective",
    "ParameterInfo",
    "ParameterSpace",
    "Pattern",
    "PluginError",
    "Preset",
    "Pruned",
    "RecordError",
    "Removal",
    "Saliency",
    "Schedule",
    "ScoreContext",
    "Settings",
    "SettingsError",
    "SparsekitError",
    "Task",
    "TaskSettings",
    "Units",
    "check",
    "hookimpl",
    "keep",
    "prune",
]
