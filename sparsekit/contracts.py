"""What a plugin must keep to, checked where it is registered and where its result is used; one sentence each."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import metadata

from pydantic import BaseModel

from sparsekit.errors import PluginError
from sparsekit.interfaces import CurvatureEstimator, EstimatorSettings, Preset
from sparsekit.removal import InverseFisher


def checked(found: object, kind: str, base: type) -> str:
    """The name of what a plugin offers as this kind.

    Raises:
        PluginError: it could not be used; what is missing.
    """
    if base is Preset:
        if not isinstance(found, base):
            raise PluginError(f"a preset must be a sparsekit.{base.__name__}; {found!r} is not")
        if not isinstance(found.settings, Mapping):
            raise PluginError(f"the `settings` of the preset '{found.name}' must be a mapping, not {found.settings!r}")
    elif not (isinstance(found, type) and issubclass(found, base)):
        raise PluginError(f"a {kind} must be a subclass of sparsekit.{base.__name__}; {found!r} is not")
    name = getattr(found, "name", None)
    if not isinstance(name, str):
        raise PluginError(f"the {kind} {getattr(found, '__name__', found)} has no `name`")
    if isinstance(found, type):
        _check_class(found, f"the {kind} '{name}'", 2 if base is CurvatureEstimator else 1)
        _check_settings(found, f"the {kind} '{name}'", EstimatorSettings if base is CurvatureEstimator else BaseModel)
    return name


def _check_class(found: type, what: str, arguments: int) -> None:
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise PluginError(f"{what} does not implement {', '.join(missing)}")
    signature = inspect.signature(found)
    try:
        signature.bind(*[None] * arguments)
    except TypeError as error:
        needed = "(space, settings)" if arguments == 2 else "(settings)"
        raise PluginError(f"{what} must be made from {needed}; its constructor takes {signature}: {error}") from error


def _check_settings(found: type, what: str, base: type[BaseModel]) -> None:
    settings = getattr(found, "Settings", None)
    if not (isinstance(settings, type) and issubclass(settings, base)):
        needed = "sparsekit.EstimatorSettings" if base is EstimatorSettings else "sparsekit.Settings"
        raise PluginError(
            f"the `Settings` of {what} must be a pydantic model, a subclass of {needed}; got {settings!r}"
        )


def inverse_of(estimator: CurvatureEstimator) -> InverseFisher:
    """The estimator's Σ.

    Raises:
        PluginError: it is something else.
    """
    found = estimator.inverse()
    if not isinstance(found, InverseFisher):
        raise PluginError(
            f"`inverse` of the estimator '{estimator.name}' ({origin(type(estimator))}) returned a "
            f"{type(found).__name__}; a sparsekit.InverseFisher is needed: InverseFisher(operator, damping)"
        )
    return found


def origin(found: type) -> str:
    """Plugin and distribution of a class, or its module where it comes from no installed plugin."""
    package = found.__module__.partition(".")[0]
    for point in metadata.entry_points(group="sparsekit"):
        if point.module.partition(".")[0] == package and point.dist is not None:
            return f"plugin '{point.name}' of {point.dist.name} {point.dist.version}"
    return f"module {found.__module__}"
