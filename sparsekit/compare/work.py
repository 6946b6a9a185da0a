"""What a worker does: the runs of a job, one after the other, so that they share their curvature statistics."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sparsekit.compare.plan import FAILURES, RUNS, Failure, PlannedRun, write
from sparsekit.errors import DamagedError, SparsekitError
from sparsekit.provenance import now
from sparsekit.registry import Registry
from sparsekit.run import execute, load_registry
from sparsekit.settings import resolve
from sparsekit.sharing import SharedStatistics


@dataclass(frozen=True, eq=False)
class Job:
    """Runs for one worker.

    Attributes:
        directory: of the comparison.
        runs: in their order.
        again: whether to make anew what is found damaged.
    """

    directory: Path
    runs: tuple[PlannedRun, ...]
    again: bool = False


@cache
def registry() -> Registry:
    """Loaded once in each worker."""
    return load_registry()


def do(job: Job) -> None:
    """Do a job's runs. One that fails leaves its cause in the comparison's `failures`, and the rest go on.

    Raises:
        RecordError: not even that can be written.
    """
    shared = SharedStatistics()
    for run in job.runs:
        place = failure_path(job.directory, run)
        try:
            one(job.directory / RUNS, run.settings, shared, again=job.again)
        except SparsekitError as error:
            write(Failure(cause=str(error), when=now()), place)
        except Exception as error:  # a bug of ours or a plugin's: told with its traceback, and no other run's concern
            details = "".join(traceback.format_exception(error))
            write(Failure(cause=f"{type(error).__name__}: {error}", details=details, when=now()), place)
        else:
            place.unlink(missing_ok=True)


def one(output: Path, settings: Mapping[str, Any], shared: SharedStatistics, *, again: bool = False) -> Any:
    """A run, or the rest of it; returns its record. The comparison tracks it, from the record."""
    own = {"output": str(output), "tracking": {"enabled": False}}
    resolved = resolve({**settings, **own}, registry())
    try:
        return execute(resolved, registry(), resume=True, shared=shared).record
    except DamagedError:
        if not again:
            raise
        return execute(resolved, registry(), fresh=True, shared=shared).record


def failure_path(directory: Path, run: PlannedRun) -> Path:
    """Where a run's failure is told."""
    return directory / FAILURES / f"{Path(run.directory).name}.json"
