"""`sparsekit study`: does modelling the loss better prune better? A comparison with that one question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsekit.cli.compare import (
    Assignments,
    Checkpoint,
    DataDir,
    DryRun,
    ExecutorName,
    NoTracking,
    Output,
    RetryFailed,
    Threads,
    TrackingUri,
    Workers,
    carry_out,
    read,
)
from sparsekit.compare.study import StudySettings, comparison
from sparsekit.registry.installed import load_registry
from sparsekit.runs.validation import validated


def study(
    file: Annotated[Path, typer.Argument(help="YAML file of the study.")],
    output: Output = Path("results"),
    data_dir: DataDir = None,
    checkpoint: Checkpoint = None,
    assignments: Assignments = None,
    workers: Workers = None,
    threads: Threads = 1,
    executor: ExecutorName = "local",
    retry_failed: RetryFailed = False,
    tracking_uri: TrackingUri = None,
    no_tracking: NoTracking = False,
    dry_run: DryRun = False,
) -> None:
    """Study loss modelling and locality: criteria × sub-steps × norm penalties. Finished runs are kept."""
    registry = load_registry()
    raw = read(file, assignments or [], data_dir, checkpoint, tracking_uri, no_tracking)
    given = comparison(validated(StudySettings, raw, ""), registry)
    carry_out(given, registry, output, workers, threads, executor, retry_failed, dry_run)
