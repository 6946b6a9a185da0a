"""`sparsekit plugins`: the installed plugins, what they register, and whether they work."""

from __future__ import annotations

import json
from typing import Annotated

import typer
import yaml
from rich.table import Table

from sparsekit.cli.terminal import console as terminal
from sparsekit.methods.interfaces import Preset
from sparsekit.registry.installed import load_registry
from sparsekit.registry.registry import KINDS, Registry


def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
    settings: Annotated[
        str | None,
        typer.Option("--settings", metavar="NAME", help="Show the settings of what has this name."),
    ] = None,
) -> None:
    """List the installed plugins and what they register."""
    registry = load_registry()
    if settings is not None:
        _print_settings(registry, settings)
        return
    rows = [
        {
            "name": info.name,
            "version": info.version,
            "distribution": info.distribution,
            "registers": info.registers,
            "status": info.status,
        }
        for info in registry.plugins
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("name", "version", "distribution", "registers", "status")
    for row, info in zip(rows, registry.plugins, strict=True):
        what = "\n".join(f"{kind}: {', '.join(names)}" for kind, names in info.registers.items())
        table.add_row(info.name, info.version, info.distribution, what, str(row["status"]))
    terminal().print(table)


def _print_settings(registry: Registry, name: str) -> None:
    found = [kind for kind in KINDS if name in registry.names(kind)]
    for kind in found or ["estimator"]:
        item = registry.get(kind, name)
        if isinstance(item, Preset):
            differs = f"\n# Differs: {item.differs}." if item.differs else ""
            settings = yaml.safe_dump(dict(item.settings), sort_keys=False)
            typer.echo(f"# The preset {name}: {item.reference}.{differs}\n{settings}")
            continue
        table = Table("setting", "default", "meaning", title=f"{kind} {name}")
        for field, info in item.Settings.model_fields.items():
            default = (
                "required"
                if info.is_required()
                else json.dumps(info.get_default(call_default_factory=True), default=str)
            )
            table.add_row(f"{kind}.{field}", default, info.description or "")
        terminal().print(table)
