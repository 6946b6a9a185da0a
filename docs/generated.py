"""The pages of the reference, made from the code when the site is built; a hook of MkDocs.

`pages()` gives them without MkDocs: tests look there for what is missing.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin

import click
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import sparsekit
import sparsekit.curvature
import sparsekit.linalg
import sparsekit.testing
from sparsekit.cli import app
from sparsekit.compare.spec import ComparisonSettings
from sparsekit.compare.study import StudySettings
from sparsekit.methods.interfaces import FinetuneSettings, Preset
from sparsekit.registry import hookspecs
from sparsekit.registry.installed import load_registry
from sparsekit.registry.registry import KINDS
from sparsekit.runs.settings import RunSettings

#: Our own plugins, whose components are described; others are not part of this documentation.
OWN = ("sparsekit", "sparsekit-fishleg", "sparsekit-obs", "sparsekit-mfac", "sparsekit-woodfisher")

#: Where a public name is defined -> the heading under which it is described.
TOPICS = {
    "sparsekit.api": "Prune",
    "sparsekit.methods": "What plugins supply",
    "sparsekit.problem.likelihoods": "Losses",
    "sparsekit.problem": "Weights, masks, model and data",
    "sparsekit.pruning": "Train what was pruned",
    "sparsekit.removal": "Removal",
    "sparsekit.errors": "Errors",
    "sparsekit.curvature": "Gradients and their sums",
    "sparsekit.linalg": "Operators",
    "sparsekit.testing.oracles": "Oracles",
    "sparsekit.testing": "Checks",
}

OTHER = "Also"

ENVIRONMENT = {
    "SPARSEKIT_CACHE": "folder of trained networks and decoded images; default: the user's cache folder",
    "SPARSEKIT_PLUGINS": "names of the plugins to load, with commas; empty: the built-ins alone, as `--no-plugins`",
    "SPARSEKIT_STRICT": "1: a plugin that does not load is an error at once, not a line in `sparsekit plugins`",
    "MLFLOW_TRACKING_URI": "where runs are tracked, unless `tracking.uri` says",
}


def pages() -> dict[str, str]:
    """Path below the documentation -> its Markdown."""
    return {
        "reference/commands.md": _commands(),
        "reference/settings.md": _settings(),
        "reference/components.md": _components(),
        "reference/hooks.md": _hooks(),
        "reference/sparsekit.md": _door(sparsekit),
        "reference/curvature.md": _door(sparsekit.curvature),
        "reference/linalg.md": _door(sparsekit.linalg),
        "reference/testing.md": _door(sparsekit.testing),
    }


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to those that MkDocs has found."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


# -- commands ----------------------------------------------------------------------------------------------
def commands() -> Iterator[tuple[str, click.Command]]:
    """'sparsekit mask show' and the like, with the command."""

    def below(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        yield name, command
        for child, one in getattr(command, "commands", {}).items():
            yield from below(f"{name} {child}", one)

    yield from below("sparsekit", typer.main.get_command(app))


def _commands() -> str:
    out = ["# Commands", "", "What `--help` says, of every command.", ""]
    for name, command in commands():
        out += [f"## {name}", "", inspect.cleandoc(command.help or ""), ""]
        shown = [parameter for parameter in command.params if "--help" not in parameter.opts]
        if shown:
            out += ["| | default | |", "|---|---|---|"]
            out += [_parameter(parameter) for parameter in shown] + [""]
    out += ["## Environment", "", "| variable | |", "|---|---|"]
    out += [f"| `{name}` | {meaning} |" for name, meaning in ENVIRONMENT.items()]
    codes = "0 done · 1 some runs failed, or a check did · 2 what you can mend · 130 interrupted"
    untold = "3 done, but standard output did not take the result"
    return "\n".join([*out, "", "## Exit codes", "", f"{codes} · {untold}.", ""])


def _parameter(parameter: click.Parameter) -> str:
    help_text = getattr(parameter, "help", None) or ""
    if isinstance(parameter, click.Argument):
        name = (parameter.metavar or parameter.name or "").upper()
    else:
        name = ", ".join(parameter.opts + parameter.secondary_opts)
    default = parameter.default
    told = "" if default is None or callable(default) or isinstance(default, bool) or default == () else f"`{default}`"
    return f"| `{name}` | {told} | {_cell(help_text)} |"


# -- settings ----------------------------------------------------------------------------------------------
def models() -> dict[str, type[BaseModel]]:
    """Heading -> settings that belong to no component."""
    return {
        "A run": RunSettings,
        "Fine-tuning": FinetuneSettings,
        "A comparison": ComparisonSettings,
        "A study": StudySettings,
    }


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field by its dotted name, those of nested settings after it."""
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}", info
        for nested in _nested(info.annotation):
            yield from fields(nested, f"{prefix}{name}.")


def _nested(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (dict, Mapping, list, tuple):
        return []
    return [one for part in get_args(annotation) for one in _nested(part)]


def _table(model: type[BaseModel], prefix: str = "") -> list[str]:
    rows = [
        f"| `{name}` | {_default(info)} | {_cell(info.description or '')} |" for name, info in fields(model, prefix)
    ]
    return ["| setting | default | |", "|---|---|---|", *rows, ""] if rows else ["No settings of its own.", ""]


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    return "" if isinstance(value, BaseModel) else f"`{json.dumps(value, default=str)}`"


def _settings() -> str:
    out = [
        "# Settings",
        "",
        "Each is given by `--set NAME=VALUE`, in a file for `--config`, or as an argument of `sparsekit.prune`; the "
        "most used have options of their own. Settings of a component stand in the same mapping as its `name`, see "
        "[components](components.md).",
        "",
    ]
    for heading, model in models().items():
        out += [f"## {heading}", "", *_table(model, "finetune." if model is FinetuneSettings else "")]
    return "\n".join(out)


# -- components --------------------------------------------------------------------------------------------
def components() -> Iterator[tuple[str, str, Any]]:
    """Kind, name and class (or preset) of all that sparsekit and its own plugins register."""
    registry = load_registry()
    for info in registry.plugins:
        if info.distribution in OWN:
            for kind, names in info.registers.items():
                yield from ((kind, name, registry.get(kind, name)) for name in names)


def _components() -> str:
    out = [
        "# Components and their settings",
        "",
        "What `sparsekit plugins --settings NAME` shows, of all there is.",
        "",
    ]
    found = list(components())
    for kind in KINDS:
        out += [f"## {_plural(kind).capitalize()}", ""]
        for _, name, item in (one for one in found if one[0] == kind):
            out += [f"### {name} {{ #{kind}-{name} }}", ""]
            if isinstance(item, Preset):
                out += [f"{item.reference}.", "", "| setting | |", "|---|---|"]
                out += [f"| `{key}` | `{json.dumps(value, default=str)}` |" for key, value in item.settings.items()]
                out += ["", f"Differs: {item.differs}." if item.differs else "", ""]
                continue
            out += [_prose(inspect.getdoc(item) or ""), "", *_table(item.Settings, f"{kind}.")]
    return "\n".join(out)


def _prose(doc: str) -> str:
    """A docstring up to its first section."""
    text = doc
    for section in ("Args:", "Attributes:", "Raises:", "Returns:"):
        text = text.split(f"\n{section}")[0]
    return text.strip()


# -- hooks and doors ---------------------------------------------------------------------------------------
def hooks() -> dict[str, str]:
    """Name -> what it is for."""
    found = inspect.getmembers(hookspecs, inspect.isfunction)
    return {name: inspect.getdoc(one) or "" for name, one in found if name.startswith("sparsekit_")}


def _hooks() -> str:
    out = [
        "# Hooks",
        "",
        "Functions that a plugin's module may define, each marked `@sparsekit.hookimpl`; the module is named under the "
        "entry-point group `sparsekit` in `pyproject.toml`. See [write your own](../extending/index.md).",
        "",
    ]
    for name, meaning in hooks().items():
        returns = inspect.signature(getattr(hookspecs, name)).return_annotation
        out += [f"## {name}", "", f"    def {name}() -> {returns}", "", meaning, ""]
    return "\n".join(out)


def _door(module: ModuleType) -> str:
    name = module.__name__
    out = [f"# {name}", "", (inspect.getdoc(module) or "").strip(), ""]
    for heading, names in by_topic(module).items():
        out += [f"## {heading}", ""]
        for public in names:
            out += [f"::: {name}.{public}", ""]
    return "\n".join(out)


def by_topic(module: ModuleType) -> dict[str, list[str]]:
    """Heading -> the door's public names whose module the heading stands for, in the order of TOPICS."""
    out: dict[str, list[str]] = {heading: [] for heading in [*TOPICS.values(), OTHER]}
    for public in public_names(module):
        home = getattr(getattr(module, public), "__module__", None) or ""
        out[next((heading for prefix, heading in TOPICS.items() if home.startswith(prefix)), OTHER)].append(public)
    return {heading: names for heading, names in out.items() if names}


def public_names(module: ModuleType) -> Sequence[str]:
    """What a door offers, in its order."""
    return list(module.__all__)


def _plural(kind: str) -> str:
    return f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    for path, text in pages().items():
        print(Path(path), len(text))
