"""The registry of plugins. A plugin that fails to load is listed with its error, which is raised only if it is used."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import metadata
from types import ModuleType
from typing import Any

import pluggy

from sparsekit.errors import PluginError, SettingsError, unknown_name
from sparsekit.methods.contracts import checked
from sparsekit.methods.interfaces import CurvatureEstimator, Pattern, Preset, Saliency, Schedule, Task
from sparsekit.registry import hookspecs
from sparsekit.registry.interface import check_interface

#: kind -> (hook, base class; presets are instances of theirs)
KINDS: dict[str, tuple[str, type]] = {
    "estimator": ("sparsekit_estimators", CurvatureEstimator),
    "saliency": ("sparsekit_saliencies", Saliency),
    "schedule": ("sparsekit_schedules", Schedule),
    "pattern": ("sparsekit_patterns", Pattern),
    "task": ("sparsekit_tasks", Task),
    "preset": ("sparsekit_presets", Preset),
}


@dataclass
class PluginInfo:
    """One plugin: its distribution, what it registers, and its error if it has one."""

    name: str
    distribution: str
    version: str
    registers: dict[str, list[str]] = field(default_factory=dict)
    error: BaseException | None = None

    @property
    def status(self) -> str:
        """`ok`, or the error in one printable line."""
        if self.error is None:
            return "ok"
        try:
            message = str(self.error)
        except Exception as error:  # the error's class is the plugin's and may fail here too
            message = f"its message cannot be had, {type(error).__name__}"
        return f"{type(self.error).__name__}: " + "".join(c if c.isprintable() else " " for c in message)


class Registry:
    """All components under the entry-point group `sparsekit`, by kind and name."""

    def __init__(self, builtins: ModuleType, entry_points: Iterable[metadata.EntryPoint] | None = None) -> None:
        self.plugins: list[PluginInfo] = []
        self._found: dict[str, dict[str, list[tuple[PluginInfo, object]]]] = {kind: {} for kind in KINDS}
        core = PluginInfo("builtins", "sparsekit", _version("sparsekit"))
        self._register(core, builtins)
        if entry_points is None:
            entry_points = metadata.entry_points(group=hookspecs.PROJECT)
        for point in sorted(entry_points, key=lambda point: point.name):
            dist = point.dist
            info = PluginInfo(point.name, dist.name if dist else point.value, dist.version if dist else "unknown")
            try:
                # a plugin's prints must not mix with a command's output, which scripts read
                with redirect_stdout(sys.stderr):
                    module = point.load()
            except BaseException as error:  # any error of a plugin, also `sys.exit`, is recorded and ends nothing
                info.error = error
                self.plugins.append(info)
                continue
            self._register(info, module)

    def _register(self, info: PluginInfo, module: object) -> None:
        self.plugins.append(info)
        # One manager for each plugin, so that a failing or misspelt hook is attributed to it.
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        try:
            with redirect_stdout(sys.stderr):
                manager.register(module, name=info.name)
                if not manager.get_hookcallers(module):
                    raise PluginError("it implements no hook of sparsekit; mark its functions with sparsekit.hookimpl")
                manager.check_pending()
                check_interface(module, info.distribution)
                found = {
                    kind: [(cls, checked(cls, kind, base)) for cls in _flat(getattr(manager.hook, hook)())]
                    for kind, (hook, base) in KINDS.items()
                }
            if not any(found.values()):
                raise PluginError("its hooks return nothing; let them return the classes that it offers")
        except BaseException as error:
            info.error = error
            return
        for kind, classes in found.items():
            for cls, name in classes:
                self._add(info, kind, name, cls)

    def _add(self, info: PluginInfo, kind: str, name: str, cls: object) -> None:
        """Register a component under its name; a built-in keeps its name, and a plugin that uses it gets an error."""
        known = self._found[kind].setdefault(name, [])
        if known and known[0][0] is self.plugins[0]:
            info.error = PluginError(f"the {kind} '{name}' is sparsekit's own, which is used; rename the plugin's")
            return
        info.registers.setdefault(kind, []).append(name)
        known.append((info, cls))

    def names(self, kind: str) -> list[str]:
        """All registered names of a kind, sorted."""
        return sorted(self._found[kind])

    def get(self, kind: str, name: str) -> Any:
        """The class, or the preset, registered under a name.

        Raises:
            SettingsError: nothing has that name.
            PluginError: two plugins have it, or the plugin of that name failed to load.
        """
        providers = self._found[kind].get(name, [])
        if len(providers) == 1:
            return providers[0][1]
        if len(providers) > 1:
            who = " and ".join(info.distribution for info, _ in providers)
            raise PluginError(f"the {kind} '{name}' is registered by {who}; uninstall one of them")
        for info in self.plugins:
            if info.error is not None and info.name == name:
                raise PluginError(
                    f"the plugin '{name}' ({info.distribution} {info.version}) failed to load: {info.status}"
                ) from info.error
        broken = "; ".join(f"{p.name} ({p.distribution} {p.version}): {p.status}" for p in self.plugins if p.error)
        hint = f"These plugins failed to load: {broken} (see 'sparsekit plugins')." if broken else ""
        raise SettingsError(unknown_name(kind, name, self.names(kind), hint))

    def provider(self, kind: str, name: str) -> PluginInfo:
        """The plugin that registers a name."""
        self.get(kind, name)
        return self._found[kind][name][0][0]


def _flat(results: Iterable[Iterable[object]]) -> list[object]:
    return [cls for classes in results for cls in classes]


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"
