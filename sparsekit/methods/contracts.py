"""Checks of plugins where they are registered and where their results are used; each error is one sentence."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from importlib import metadata

from pydantic import BaseModel
from torch import Tensor

from sparsekit.errors import PluginError
from sparsekit.methods.interfaces import CurvatureEstimator, EstimatorSettings, Preset, Saliency, ScoreContext
from sparsekit.removal import InverseFisher

#: What a component may be called.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,49}")


def checked(found: object, kind: str, base: type) -> str:
    """The name of an object that a plugin registers as this kind, after checking that it can be used.

    Raises:
        PluginError: it cannot be used; the message says what is missing.
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
    if not NAME.fullmatch(name):
        raise PluginError(
            f"the {kind} {getattr(found, '__name__', found)} is named {name!r}; 1 to 50 letters, digits and . _ : - "
            "were needed, the first a letter or digit, because the name is an option's value and part of folders' names"
        )
    if isinstance(found, type):
        if "name" not in vars(found):
            raise PluginError(
                f"the {kind} {found.__name__} has the `name` '{name}' of the class that it inherits from; give it one "
                "of its own"
            )
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
    needed = "a sparsekit.InverseFisher, InverseFisher(operator, damping)"
    _returned(found, estimator, "inverse", needed, isinstance(found, InverseFisher))
    return found


def scores_of(saliency: Saliency, context: ScoreContext) -> Tensor:
    """The saliency's scores, (n,).

    Raises:
        PluginError: it is something else.
    """
    found = saliency.score(context)
    shape = context.weights.shape
    right = isinstance(found, Tensor) and found.shape == shape
    _returned(found, saliency, "score", f"a tensor {tuple(shape)}, a score for each weight,", right)
    return found


def _returned(found: object, component: CurvatureEstimator | Saliency, method: str, needed: str, right: bool) -> None:
    if not right:
        what = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise PluginError(
            f"`{method}` of '{component.name}' ({origin(type(component))}) returned {what}; {needed} is needed"
        )


def origin(found: type) -> str:
    """Plugin and distribution of a class, or its module where it does not belong to an installed plugin."""
    package = found.__module__.partition(".")[0]
    for point in metadata.entry_points(group="sparsekit"):
        if point.module.partition(".")[0] == package and point.dist is not None:
            return f"plugin '{point.name}' of {point.dist.name} {point.dist.version}"
    return f"module {found.__module__}"
