"""`sparsekit report`: a report of a comparison from its records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsekit.cli.terminal import keep


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a comparison.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the report; default DIR/report.")] = None,
) -> None:
    """Write up a comparison from its records: tables, plots, paired differences, as HTML, Markdown, CSV and JSON."""
    from sparsekit.report import write_report  # matplotlib and scipy: other commands start without them

    written = write_report(directory, output)
    keep(written)
    typer.echo(f"Report: {written}")
