"""The work of one worker: the runs of a job, one after another, so that they share curvature statistics."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sparsekit.compare.plan import FAILURES, RUNS, Failure, PlannedRun, write
from sparsekit.errors import DamagedError, RecordError, SparsekitError
from sparsekit.machine import now
from sparsekit.registry.installed import load_registry
from sparsekit.registry.registry import Registry
from sparsekit.runs.curvature_cache import SharedStatistics
from sparsekit.runs.run import execute
from sparsekit.runs.schema import RunRecord
from sparsekit.runs.settings import resolve


@dataclass(frozen=True, eq=False)
class Job:
    """Runs for one worker.

    Attributes:
        directory: of the comparison.
        runs: in their order.
        again: whether damaged runs are done again.
    """

    directory: Path
    runs: tuple[PlannedRun, ...]
    again: bool = False


@cache
def registry() -> Registry:
    """The registry, loaded once in each worker."""
    return load_registry()


def do(job: Job) -> None:
    """Do a job's runs. A failure is written to the comparison's `failures`, and the other runs are still done.

    Raises:
        RecordError: a failure cannot be written.
    """
    shared = SharedStatistics()
    for run in job.runs:
        place = failure_path(job.directory, run)
        try:
            one(job.directory / RUNS, run.settings, shared, run.directory, again=job.again)
        except SparsekitError as error:
            write(Failure(cause=str(error), when=now()), place)
        except Exception as error:  # a bug, ours or a plugin's: recorded with its traceback
            details = "".join(traceback.format_exception(error))
            write(Failure(cause=f"{type(error).__name__}: {error}", details=details, when=now()), place)


def one(
    output: Path, settings: Mapping[str, object], shared: SharedStatistics, planned: str = "", *, again: bool = False
) -> RunRecord:
    """Do a run, or what is left of it. It does not upload to MLflow: the comparison does.

    Raises:
        RecordError: its directory is not the planned one: data, weights or device differ from those of the plan.
    """
    own = {"output": str(output), "tracking": {"enabled": False}}
    resolved = resolve({**settings, **own}, registry())
    try:
        done = execute(resolved, registry(), resume=True, shared=shared)
    except DamagedError:
        if not again:
            raise
        done = execute(resolved, registry(), fresh=True, shared=shared)
    if planned and done.path.name != Path(planned).name:
        raise RecordError(
            f"the worker's run went to '{done.path}', not to '{planned}': it sees another device, other data or other "
            "weights than the plan was made with; give the same command again"
        )
    return done.record


def failure_path(directory: Path, run: PlannedRun) -> Path:
    """The file of a run's failure."""
    return directory / FAILURES / f"{Path(run.directory).name}.json"
