"""`sparsekit plugins`: what is installed, what it registers, whether it works; a new one; a check of one."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table

from sparsekit.cli.terminal import console as terminal
from sparsekit.cli.terminal import marked
from sparsekit.errors import SettingsError, SparsekitError, unknown_name
from sparsekit.files import atomic_write
from sparsekit.methods.contracts import NAME
from sparsekit.methods.interfaces import INTERFACE_VERSION, Preset
from sparsekit.registry.installed import load_registry
from sparsekit.registry.registry import KINDS, Registry

plugins = typer.Typer(no_args_is_help=False, help="List the installed plugins; make a new one; check one.")

#: What `plugins new` can make, and a command that uses the result.
COMMANDS = {
    "estimator": "sparsekit run --estimator {name}",
    "saliency": "sparsekit run --estimator diagonal --saliency {name}",
    "schedule": "sparsekit run --estimator diagonal --schedule {name}",
    "pattern": "sparsekit run --estimator diagonal --pattern {name}",
    "task": "sparsekit run --task {name} --estimator diagonal",
}


@plugins.callback(invoke_without_command=True)
def listing(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
    settings: Annotated[
        str | None,
        typer.Option("--settings", metavar="NAME", help="Show the settings of what has this name."),
    ] = None,
) -> None:
    """List the installed plugins and what they register."""
    if context.invoked_subcommand is not None:
        return
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


# -- a new one ---------------------------------------------------------------------------------------------
@plugins.command()
def new(
    name: Annotated[str, typer.Argument(help="Of the component and its plugin, such as my-estimator.")],
    kind: Annotated[str, typer.Option(help=f"One of {', '.join(COMMANDS)}.")] = "estimator",
    output: Annotated[Path, typer.Option(help="Folder that the distribution's folder is made in.")] = Path("."),
) -> None:
    """Make an installable distribution: pyproject, one short module that works, tests on the conformance kit."""
    from importlib.metadata import version

    from jinja2 import Environment, PackageLoader, StrictUndefined

    if kind not in COMMANDS:
        raise SettingsError(unknown_name("kind", kind, list(COMMANDS)))
    if not NAME.fullmatch(name) or not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise SettingsError(f"the name {name!r} was given; words of small letters and digits joined by - are needed")
    distribution = f"sparsekit-{name}"
    folder, module = output / distribution, distribution.replace("-", "_")
    if folder.exists():
        raise SettingsError(f"there is a '{folder}' already; give another name or --output")
    cls = "".join(part.capitalize() for part in name.split("-"))
    known = {
        "name": name,
        "kind": kind,
        "distribution": distribution,
        "module": module,
        "cls": cls,
        "interface": INTERFACE_VERSION,
        "version": version("sparsekit"),
        "command": COMMANDS[kind].format(name=name),
        "checked": f"lambda: {cls}({cls}.Settings())" if kind == "task" else cls,
    }
    environment = Environment(
        loader=PackageLoader("sparsekit.cli"), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    files = {
        "pyproject.toml": "pyproject.toml.j2",
        "README.md": "README.md.j2",
        f"src/{module}/__init__.py": f"{kind}.py.j2",
        "tests/test_conformance.py": "test.py.j2",
    }
    for path, template in files.items():
        atomic_write(folder / path, environment.get_template(template).render(known).encode())
    typer.echo(f"{folder} is made. pip install -e '{folder}[test]', then sparsekit plugins check {name}")


# -- a check -----------------------------------------------------------------------------------------------
@plugins.command()
def check(
    name: Annotated[str, typer.Argument(help="Of a plugin, as `sparsekit plugins` lists it.")],
    failures: Annotated[bool, typer.Option("--failures", help="Show only what fails.")] = False,
) -> None:
    """Load a plugin, and run the conformance kit on all that it registers; exits with 1 where something fails."""
    registry = load_registry()
    found = [info for info in registry.plugins if info.name == name]
    if not found:
        raise SettingsError(unknown_name("plugin", name, [info.name for info in registry.plugins]))
    [info] = found[:1]
    if info.error is not None:
        raise SparsekitError(f"the plugin '{name}' does not load: {info.status}")
    console, failed, count = terminal(), 0, 0
    for kind, names in info.registers.items():
        for component in names:
            for what, run in _checks(registry.get(kind, component), kind):
                message = _failure(run)
                count, failed = count + 1, failed + (message is not None)
                if message is not None:
                    console.print(marked("failed:", "red", f"{kind} {component}, {what}: {message}"), highlight=False)
                elif not failures:
                    console.print(f"ok: {kind} {component}, {what}", highlight=False)
    console.print(f"{count - failed} of {count} checks of '{name}' ({info.distribution} {info.version}) pass.")
    if failed:
        sys.exit(1)


def _checks(component: Any, kind: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """The kit's checks of one component, with what its class says in `conformance`, the kit's arguments."""
    from sparsekit import testing  # only for this command: what is tested does not import its tests

    given: Mapping[str, Any] = getattr(component, "conformance", {})
    if kind == "preset":
        yield "settings", lambda: None  # checked when it was loaded
    elif kind == "task":
        if "make" in given:
            yield from testing.task_checks(**given)
    else:
        kit = getattr(testing, f"{kind}_checks")
        yield from kit(component, **given)


def _failure(run: Callable[[], None]) -> str | None:
    try:
        run()
    except Exception as error:  # whatever a plugin raises is a finding
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return " ".join(f"{kind}{error}".split())
    return None
