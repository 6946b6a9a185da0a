"""`sparsekit track`: send finished runs from disk to MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsekit.compare.upload import track as tell
from sparsekit.runs.tracking_store import resolve_uri, ui_command


def track(
    directory: Annotated[Path, typer.Argument(help="Directory of a comparison, of runs, or of one run.")],
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow's address; default a SQLite file there.")] = None,
    experiment: Annotated[str, typer.Option(help="MLflow experiment.")] = "sparsekit",
) -> None:
    """Send finished runs that MLflow does not have yet; records on disk decide, MLflow only shows them."""
    uri = resolve_uri(tracking_uri, directory)
    told, finished = tell(directory, uri, experiment)
    typer.echo(f"{told} runs were told, of {finished} that are finished. MLflow: {ui_command(uri)}")
