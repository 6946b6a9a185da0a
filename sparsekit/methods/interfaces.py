"""The interfaces that a plugin may implement: estimators, saliencies, schedules, patterns and tasks."""

from __future__ import annotations

from sparsekit.methods.estimator import CurvatureEstimator, EstimatorSettings
from sparsekit.methods.pattern import Pattern, Trial, Units
from sparsekit.methods.saliency import Saliency, ScoreContext
from sparsekit.methods.schedule import Schedule
from sparsekit.methods.settings import (
    BatchNormSettings,
    CompensationSettings,
    FinetuneSettings,
    Preset,
    ReconstructionSettings,
    Settings,
)
from sparsekit.methods.task import Split, Task, TaskSettings
from sparsekit.problem.measurement import measure

#: Incremented with each change of an interface that breaks plugins; part of every run's identity.
INTERFACE_VERSION = 1

__all__ = [
    "BatchNormSettings",
    "CompensationSettings",
    "CurvatureEstimator",
    "EstimatorSettings",
    "FinetuneSettings",
    "INTERFACE_VERSION",
    "Pattern",
    "Preset",
    "ReconstructionSettings",
    "Saliency",
    "Schedule",
    "ScoreContext",
    "Settings",
    "Split",
    "Task",
    "TaskSettings",
    "Trial",
    "Units",
    "measure",
]
