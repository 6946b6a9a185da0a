"""The registry of the built-ins and all installed plugins."""

from __future__ import annotations

from sparsekit.registry import builtins
from sparsekit.registry.registry import Registry


def load_registry() -> Registry:
    """The built-ins and every installed plugin."""
    return Registry(builtins)
