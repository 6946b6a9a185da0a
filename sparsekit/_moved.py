"""Modules under the names that they had before they stood in rooms: importing one works, and says the new name."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

#: The last part of an old name -> the new name.
MOVED = {
    "builtins": "registry.builtins",
    "estimators": "methods.estimators",
    "finetune": "pruning.finetune",
    "hookspecs": "registry.hookspecs",
    "interfaces": "methods.interfaces",
    "likelihoods": "problem.likelihoods",
    "masks": "runs.masks",
    "objective": "problem.objective",
    "parameters": "problem.parameters",
    "patterns": "methods.patterns",
    "provenance": "runs.identity",
    "pruner": "pruning.pruner",
    "publish": "runs.publish",
    "records": "runs.directory",
    "replay": "reconstruction.activations",
    "run": "runs.run",
    "saliencies": "methods.saliencies",
    "schedules": "methods.schedules",
    "settings": "runs.settings",
    "sharing": "runs.curvature_cache",
    "tracking": "runs.tracking",
}


class _Finder(MetaPathFinder, Loader):
    """Finds `sparsekit.<old>`, and gives the module that it is now."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, old = name.rpartition(".")
        return ModuleSpec(name, self) if package == "sparsekit" and old in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.rpartition(".")[2]
        _say(old, stacklevel=3)  # frames of the import itself are not counted
        sys.modules[module.__name__] = import_module(f"sparsekit.{MOVED[old]}")


def _say(old: str, stacklevel: int) -> None:
    message = f"sparsekit.{old} is now sparsekit.{MOVED[old]}; import it from there, or its public names from sparsekit"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


def attribute(old: str) -> ModuleType:
    """The module that `sparsekit.<old>` was, without an import of it: the package's attribute.

    Raises:
        AttributeError: there was none.
    """
    if old not in MOVED:
        raise AttributeError(f"module 'sparsekit' has no attribute '{old}'")
    _say(old, stacklevel=3)
    return import_module(f"sparsekit.{MOVED[old]}")


def install() -> None:
    """Have old names found."""
    sys.meta_path.insert(0, _Finder())
