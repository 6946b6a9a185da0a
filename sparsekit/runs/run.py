"""The execution of a run from its resolved settings to its record."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sparsekit import processes
from sparsekit.errors import RecordError, SparsekitError
from sparsekit.machine import available_memory, describe_machine, find_device, forget_peak_memory, now
from sparsekit.methods.interfaces import Task
from sparsekit.problem.objective import Objective
from sparsekit.problem.parameters import ParameterSpace
from sparsekit.problem.unused import used
from sparsekit.reconstruction.fit import Reconstruction
from sparsekit.registry.registry import Registry
from sparsekit.runs.curvature_cache import SharedStatistics
from sparsekit.runs.degraded import not_reconstructed
from sparsekit.runs.directory import RunDirectory
from sparsekit.runs.driver import UNTOLD, Driver, Listener, Progress
from sparsekit.runs.identity import identity as run_identity
from sparsekit.runs.identity import plugins_used, sources
from sparsekit.runs.preview import Preview, check_sparsities, preview, with_examples
from sparsekit.runs.schema import RunRecord, run_key
from sparsekit.runs.settings import ResolvedRun
from sparsekit.runs.tracking_store import resolve_uri


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
    apart: Path | None = None,
    listener: Listener = lambda event: None,
    progress: Progress = lambda phase, done, total: None,
) -> Outcome:
    """Do a run, or the rest of it.

    A finished run with the same identity is not done again. An interrupted one is an error unless `resume` (continue
    after its last whole step) or `fresh` (discard it) is given. The statistics of the first update are taken from
    `shared` if an earlier run of this process has stored them there; otherwise they are stored for later runs.

    With several processes (`processes.group`) each does the whole run; all but the first do it in a folder `apart`.

    Raises:
        SparsekitError: any error that a user can correct.
    """
    device, tracking = find_device(resolved.settings.device), resolved.settings.tracking
    uri = resolve_uri(tracking.uri, Path(resolved.settings.output)) if tracking.enabled and not apart else None
    shown = preview(resolved)
    task = resolved.task.build()
    asked, resolved = resolved, with_examples(resolved, task)
    if resolved is not asked:
        shown = preview(resolved)
    estimator = resolved.estimator.build(shown.space)
    model, prepared = _dense(task, device, progress)
    identity = run_identity(resolved, registry, sources(task, model))
    directory = RunDirectory.of(Path(resolved.settings.output), task.name, estimator.name, run_key(identity))
    if apart is not None:
        directory = directory.copied(apart)
    processes.barrier()  # nothing has changed before all have copied it
    with directory.lock():
        found = None if fresh else _found(directory, resume)
        if found is not None and found.status == "finished":
            return Outcome(found, directory.path, True, _tracked_at(found))
        resolved, space, degraded = _checked(resolved, task, model, shown.space)
        if space is not shown.space:
            estimator = resolved.estimator.build(space)
        if fresh:
            directory.discard()
        record = _begun(resolved, registry, identity, device, space, shown, prepared, degraded)
        driver = Driver(resolved, task, model, space, estimator, directory, record, uri, shared)
        finished = driver.run(found is not None, listener, progress)
    return Outcome(finished, directory.path, False, uri if driver.untold is None else None)


def _begun(
    resolved: ResolvedRun,
    registry: Registry,
    identity: dict[str, object],
    device: torch.device,
    space: ParameterSpace,
    shown: Preview,
    prepared: float,
    degraded: list[str],
) -> RunRecord:
    """The record of a run before its first step."""
    return RunRecord(
        key=run_key(identity),
        task=resolved.names["task"],
        estimator=resolved.names["estimator"],
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


def _dense(task: Task, device: torch.device, progress: Progress) -> tuple[nn.Module, float]:
    """The task's network where the run will be, and the seconds that it took."""
    forget_peak_memory(device)
    progress("prepare", 0, 1)
    task.progress = lambda done, total: progress("prepare", done, total)
    task.device = device
    started = time.perf_counter()
    with processes.first_alone():  # the others read what it may have to train
        model = task.model().to(device)
    return model, time.perf_counter() - started


def _found(directory: RunDirectory, resume: bool) -> RunRecord | None:
    """The record of an earlier run, finished with its files whole, or to be gone on with."""
    found = directory.read()
    if found is not None and found.status == "finished":
        directory.check_results(found)
    elif found is not None and not resume:
        raise RecordError(
            f"an unfinished run with these settings is in {directory.path}; "
            "go on with --resume, or start again with --fresh"
        )
    return found


def _checked(
    resolved: ResolvedRun, task: Task, model: nn.Module, space: ParameterSpace
) -> tuple[ResolvedRun, ParameterSpace, list[str]]:
    """Refuse what cannot work before anything is written.

    Returns:
        The run, without a default reconstruction that cannot be done; the space that the loss depends on; and sentences
        for `degraded`.

    Args:
        resolved: the run.
        task: its own.
        model: dense.
        space: by names and shapes.
    """
    options, how = resolved.estimator.settings, resolved.settings.reconstruction
    size = options.batch_size

    def objective(limit: int) -> Objective:
        return Objective(model, task.likelihood, task.batches("train", batch_size=size, limit=limit), space)

    objective(size).check()
    left, degraded = used(objective(options.examples or size), included=resolved.settings.include is not None)
    if left is not space:
        check_sparsities(resolved, left)
    if how.how != "none":
        few = list(task.batches("train", batch_size=how.batch_size, limit=how.examples))
        try:
            Reconstruction.check(model, left, few, how, available_memory(next(model.parameters()).device).device)
        except SparsekitError as error:
            if "reconstruction" not in resolved.chosen:
                raise
            degraded.append(not_reconstructed(error))
            resolved = resolved.without_reconstruction()
    return resolved, left, degraded


def _tracked_at(record: RunRecord) -> str | None:
    """MLflow's address for a finished run; None if MLflow does not have all of it."""
    tracking = record.settings["tracking"]
    if not tracking["enabled"] or any(line.startswith(UNTOLD) for line in record.degraded):
        return None
    return resolve_uri(tracking["uri"], Path(record.settings["output"]))
