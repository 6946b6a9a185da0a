"""The hooks that a plugin may implement, under the entry-point group `sparsekit`."""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from sparsekit.methods.interfaces import CurvatureEstimator, Pattern, Preset, Saliency, Schedule, Task

PROJECT = "sparsekit"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def sparsekit_estimators() -> Sequence[type[CurvatureEstimator]]:  # type: ignore[empty-body]
    """The curvature estimators this distribution offers."""


@hookspec
def sparsekit_saliencies() -> Sequence[type[Saliency]]:  # type: ignore[empty-body]
    """The saliencies this distribution offers."""


@hookspec
def sparsekit_schedules() -> Sequence[type[Schedule]]:  # type: ignore[empty-body]
    """The schedules this distribution offers."""


@hookspec
def sparsekit_patterns() -> Sequence[type[Pattern]]:  # type: ignore[empty-body]
    """The patterns this distribution offers."""


@hookspec
def sparsekit_tasks() -> Sequence[type[Task]]:  # type: ignore[empty-body]
    """The tasks this distribution offers."""


@hookspec
def sparsekit_presets() -> Sequence[Preset]:  # type: ignore[empty-body]
    """The published configurations this distribution offers."""
