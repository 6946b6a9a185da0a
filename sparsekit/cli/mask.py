"""`sparsekit mask`: show a mask, compare two, or apply one to weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sparsekit.cli.terminal import console as terminal
from sparsekit.cli.terminal import keep
from sparsekit.errors import SettingsError
from sparsekit.files import write_tensors
from sparsekit.models import read_state_dict
from sparsekit.runs.masks import Count, Overlap, TensorCount, apply_mask, count, overlap_of, overlaps, read_mask, total

mask = typer.Typer(
    help="Masks of runs: what they remove, how far two agree, and applied to other weights.", no_args_is_help=True
)

MASK_HELP = "A mask.safetensors, or the directory of a finished run."
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@mask.command()
def show(path: Annotated[Path, typer.Argument(metavar="MASK", help=MASK_HELP)], as_json: AsJson = False) -> None:
    """Show what a mask removes, by parameter; rows are a layer's outputs, columns its inputs."""
    counts = count(read_mask(path))
    if as_json:
        rows = {name: {**asdict(each), "sparsity": each.sparsity} for name, each in counts.items()}
        everything = total(counts.values())
        _print_json({"parameters": rows, "total": {**asdict(everything), "sparsity": everything.sparsity}})
    else:
        _print_counts(counts)


def _print_counts(counts: Mapping[str, TensorCount]) -> None:
    table = _table("parameter", "shape", "weights", "removed", "sparsity", "empty\nrows", "empty\ncolumns")
    for name, each in counts.items():
        empty = ("–" if number is None else f"{number:,}" for number in (each.empty_rows, each.empty_columns))
        table.add_row(name, "×".join(map(str, each.shape)), *_figures(each), *empty)
    table.add_section()
    table.add_row("total", "", *_figures(total(counts.values())), "", "")
    terminal().print(table)


def _figures(each: Count) -> tuple[str, str, str]:
    return f"{each.weights:,}", f"{each.removed:,}", f"{each.sparsity:.2%}"


@mask.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help=MASK_HELP)],
    b: Annotated[Path, typer.Argument(metavar="B", help=MASK_HELP)],
    as_json: AsJson = False,
) -> None:
    """Compare two masks: the weights that both remove, and the number that two random masks would share."""
    by_name = overlaps(read_mask(a), read_mask(b))
    if as_json:
        rows = {name: _plain(each) for name, each in by_name.items()}
        _print_json({"parameters": rows, "total": _plain(overlap_of(by_name.values()))})
    else:
        _print_overlaps(by_name)


def _plain(each: Overlap) -> dict[str, object]:
    return {**asdict(each), "agreement": each.agreement, "expected_agreement": each.expected_agreement}


def _print_overlaps(by_name: Mapping[str, Overlap]) -> None:
    table = _table("parameter", "both", "only A", "only B", "agreement", "by chance")
    for name, each in {**by_name, "": overlap_of(by_name.values())}.items():
        counted = (f"{number:,}" for number in (each.both, each.only_a, each.only_b))
        if not name:
            table.add_section()
        table.add_row(name or "total", *counted, f"{each.agreement:.3f}", f"{each.expected_agreement:.3f}")
    console = terminal()
    console.print(table)
    console.print(
        "Counted are removed weights. Agreement is |A ∩ B| / |A ∪ B|; by chance: about that of random masks that "
        "remove as many of each parameter."
    )


@mask.command()
def apply(
    path: Annotated[Path, typer.Argument(metavar="MASK", help=MASK_HELP)],
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="A state dict: safetensors, or a torch file.")],
    output: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the output where it exists.")] = False,
) -> None:
    """Write weights with those that a mask removes set to zero."""
    if output.suffix != ".safetensors":
        raise SettingsError(f"the output '{output}' would hold safetensors; give a name that ends in .safetensors")
    if output.exists() and not force:
        raise SettingsError(f"the output '{output}' exists; give another name, or --force to replace it")
    applied = apply_mask(read_mask(path), read_state_dict(weights))
    write_tensors(output, applied.weights, {"format": "pt"})
    keep(output)
    typer.echo(f"{applied.zeroed:,} weights newly set to zero, {applied.already:,} were zero already.")
    for name, parameter in applied.tied.items():
        typer.echo(f"'{name}' has the values of '{parameter}' and was masked with it.")
    typer.echo(f"Written: {output}")


def _table(first: str, *others: str) -> Table:
    table = Table()
    table.add_column(first, overflow="fold")  # a name is never cut short
    for column in others:
        table.add_column(column, justify="right")
    return table


def _print_json(content: Mapping[str, object]) -> None:
    typer.echo(json.dumps(content, indent=2))
