"""The command line: parse, delegate, print. One file a command."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from sparsekit.cli.compare import compare
from sparsekit.cli.mask import mask
from sparsekit.cli.plugins import plugins
from sparsekit.cli.report import report
from sparsekit.cli.run import run
from sparsekit.cli.study import study
from sparsekit.cli.terminal import standard_streams
from sparsekit.cli.track import track
from sparsekit.errors import SparsekitError
from sparsekit.registry.installed import PLUGINS

#: Exit code after Ctrl-C.
INTERRUPTED = 130

#: Exit code where all was done, and standard output did not take the result.
UNTOLD = 3

app = typer.Typer(
    name="sparsekit",
    help="Second-order pruning of neural networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(run)
app.command()(compare)
app.command()(study)
app.command()(track)
app.command()(report)
app.add_typer(plugins, name="plugins")
app.add_typer(mask, name="mask")


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(f"sparsekit {version('sparsekit')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    no_plugins: Annotated[bool, typer.Option("--no-plugins", help="Load the built-ins alone.")] = False,
) -> None:
    if no_plugins:
        os.environ[PLUGINS] = ""  # worker processes read it too


def main() -> None:
    """Entry point: an error that a user can mend is one message and exit code 2; a bug shows its traceback."""
    with standard_streams() as out:
        code = _done()
        out.flush()
        if out.lost is not None:
            kept = f"; what was done is in {out.kept}" if out.kept is not None else ""
            print(f"sparsekit: standard output could not be written ({out.lost}){kept}", file=sys.stderr)
            code = code or UNTOLD
    sys.exit(code)


def _done() -> str | int | None:
    """Run the command; returns its exit code."""
    try:
        app()
    except SparsekitError as error:
        print(f"sparsekit: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # what typer makes of Ctrl-C
            print("sparsekit: interrupted; the same command goes on, of a run with --resume", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("sparsekit: interrupted; the same command goes on, of a run with --resume", file=sys.stderr)
        return INTERRUPTED
    return None
