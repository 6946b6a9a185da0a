"""The execution of a run from its resolved settings to its record."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from sparsekit.errors import RecordError
from sparsekit.machine import available_memory, describe_machine, find_device, forget_peak_memory, now
from sparsekit.problem.objective import Objective
from sparsekit.problem.unused import used
from sparsekit.reconstruction.fit import Reconstruction
from sparsekit.registry.registry import Registry
from sparsekit.runs.curvature_cache import SharedStatistics
from sparsekit.runs.directory import RunDirectory
from sparsekit.runs.driver import UNTOLD, Driver, Listener, Progress
from sparsekit.runs.identity import identity as run_identity
from sparsekit.runs.identity import plugins_used, sources
from sparsekit.runs.preview import check_sparsities, preview, with_examples
from sparsekit.runs.schema import RunRecord, run_key
from sparsekit.runs.settings import ResolvedRun
from sparsekit.runs.tracking import resolve_uri


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        record: as on disk.
        path: its directory.
        repeated: True if the run had been finished before and nothing was done.
        tracking_uri: of MLflow if it has the run, or None.
    """

    record: RunRecord
    path: Path
    repeated: bool
    tracking_uri: str | None


def execute(
    resolved: ResolvedRun,
    registry: Registry,
    *,
    resume: bool = False,
    fresh: bool = False,
    shared: SharedStatistics | None = None,
    listener: Listener = lambda event: None,
    progress: Progress = lambda phase, done, total: None,
) -> Outcome:
    """Do a run, or the rest of it.

    A finished run with the same identity is not done again. An interrupted one is an error unless `resume` (continue
    after its last whole step) or `fresh` (discard it) is given. The statistics of the first update are taken from
    `shared` if an earlier run of this process has stored them there; otherwise they are stored for later runs.

    Raises:
        SparsekitError: any error that a user can correct.
    """
    settings = resolved.settings
    device = find_device(settings.device)
    uri = resolve_uri(settings.tracking.uri, Path(settings.output)) if settings.tracking.enabled else None
    shown = preview(resolved)
    task = resolved.task.build()
    asked, resolved = resolved, with_examples(resolved, task)
    if resolved is not asked:
        settings, shown = resolved.settings, preview(resolved)
    estimator = resolved.estimator.build(shown.space)
    forget_peak_memory(device)
    progress("prepare", 0, 1)
    task.progress = lambda done, total: progress("prepare", done, total)
    task.device = device
    started = time.perf_counter()
    model = task.model().to(device)
    prepared = time.perf_counter() - started
    identity = run_identity(resolved, registry, sources(task, model), device)
    directory = RunDirectory.of(Path(settings.output), task.name, estimator.name, run_key(identity))
    with directory.lock():
        found = None if fresh else directory.read()
        if found is not None and found.status == "finished":
            directory.check_results(found)
            return Outcome(found, directory.path, True, _tracked_at(found))
        if found is not None and not resume:
            raise RecordError(
                f"an unfinished run with these settings is in {directory.path}; "
                "go on with --resume, or start again with --fresh"
            )
        options = resolved.estimator.settings
        first = task.batches("train", batch_size=options.batch_size, limit=options.batch_size)
        Objective(model, task.likelihood, first, shown.space).check()  # before anything is written
        examples = task.batches("train", batch_size=options.batch_size, limit=options.examples or options.batch_size)
        objective = Objective(model, task.likelihood, examples, shown.space)
        space, degraded = used(objective, included=settings.include is not None)
        if space is not shown.space:
            check_sparsities(resolved, space)
            estimator = resolved.estimator.build(space)
        anchors = settings.reconstruction
        if anchors.how != "none":
            few = list(task.batches("train", batch_size=anchors.batch_size, limit=anchors.examples))
            Reconstruction.check(model, space, few, anchors, available_memory(device).device)
        if fresh:
            directory.discard()
        record = RunRecord(
            key=run_key(identity),
            task=task.name,
            estimator=estimator.name,
            settings=resolved.as_dict(),
            identity=identity,
            started=now(),
            machine=describe_machine(device),
            plugins=plugins_used(resolved, registry),
            structures={name: how for name, how in shown.structures.items() if name in space},
            parameters={"prunable": space.size, "total": space.total, "skipped": space.skipped},
            path="independent" if resolved.independent else "sequential",
            dense={},
            seconds={"prepare": prepared},
            degraded=degraded,
        )
        driver = Driver(resolved, task, model, space, estimator, directory, record, uri, shared)
        finished = driver.run(resume and found is not None, listener, progress)
    return Outcome(finished, directory.path, False, uri if driver.untold is None else None)


def _tracked_at(record: RunRecord) -> str | None:
    """MLflow's address for a finished run; None if MLflow does not have all of it."""
    tracking = record.settings["tracking"]
    if not tracking["enabled"] or any(line.startswith(UNTOLD) for line in record.degraded):
        return None
    return resolve_uri(tracking["uri"], Path(record.settings["output"]))
