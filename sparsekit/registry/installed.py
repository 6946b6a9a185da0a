"""The registry of the built-ins and the installed plugins."""

from __future__ import annotations

import os
from importlib import metadata

from sparsekit.errors import PluginError
from sparsekit.registry import builtins
from sparsekit.registry.hookspecs import PROJECT
from sparsekit.registry.registry import Registry

#: Names of plugins, separated by commas: only these are loaded; empty: none. Unset: all that are installed.
PLUGINS = "SPARSEKIT_PLUGINS"

#: At 1 a plugin that cannot be loaded is an error at once, not only where it is used.
STRICT = "SPARSEKIT_STRICT"


def load_registry() -> Registry:
    """The built-ins and every installed plugin, or those that SPARSEKIT_PLUGINS names.

    Raises:
        PluginError: SPARSEKIT_PLUGINS names one that is not installed, or SPARSEKIT_STRICT is 1 and one fails to load.
    """
    points = list(metadata.entry_points(group=PROJECT))
    given = os.environ.get(PLUGINS)
    if given is not None:
        wanted = [name.strip() for name in given.split(",") if name.strip()]
        installed = sorted({point.name for point in points})
        for name in wanted:
            if name not in installed:
                raise PluginError(
                    f"{PLUGINS} names '{name}', and no plugin of that name is installed; installed: "
                    f"{', '.join(installed) or 'none'}"
                )
        points = [point for point in points if point.name in wanted]
    registry = Registry(builtins, points)
    if os.environ.get(STRICT, "0") not in ("", "0"):
        for info in registry.plugins:
            if info.error is not None:
                raise PluginError(
                    f"the plugin '{info.name}' ({info.distribution} {info.version}) failed to load: {info.status}; "
                    f"mend or uninstall it, or unset {STRICT}"
                ) from info.error
    return registry
