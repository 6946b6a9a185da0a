"""A run: settings in, a record out. Names are resolved, the pruner is driven, listeners are attached here."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.errors import DataError, RecordError
from sparsekit.machine import available_memory, describe_machine, find_device, forget_peak_memory, now, peak_memory
from sparsekit.methods.interfaces import CompensationSettings, CurvatureEstimator, EstimatorSettings, Task
from sparsekit.methods.schedules import Step, plan
from sparsekit.problem.objective import Batch, Objective
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.problem.unused import used
from sparsekit.pruning.pruner import Cut, DenseMeasured, Event, LayerReconstructed, Pruner, PrunerState, StepCompleted
from sparsekit.reconstruction.fit import LayerFit, Reconstruction
from sparsekit.registry.registry import Registry
from sparsekit.runs.curvature_cache import SharedStatistics
from sparsekit.runs.directory import RunDirectory
from sparsekit.runs.identity import identity as run_identity
from sparsekit.runs.identity import plugins_used, sources
from sparsekit.runs.publish import begin, conclude, step_metrics
from sparsekit.runs.schema import LevelRecord, RunRecord, StepRecord, run_key
from sparsekit.runs.settings import ResolvedRun
from sparsekit.runs.tracking import NullTracker, Tracker, resolve_uri

#: Seconds between checkpoints within a step, whose layers are reconstructed one by one.
SAVE_EVERY = 30.0

Listener = Callable[[Event], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Preview:
    """What a run would do, found without reading data.

    Attributes:
        space: prunable parameters, and the skipped ones with reasons.
        steps: the plan.
        memory: bytes that the estimator will need.
        structures: name of a parameter -> how its curvature is modelled, where the estimator tells.
        settings: resolved.
        device: where it would run.
    """

    space: ParameterSpace
    steps: list[Step]
    memory: int
    structures: dict[str, str]
    settings: dict[str, Any]
    device: str


def preview(resolved: ResolvedRun) -> Preview:
    """What `--dry-run` shows; also refuses what cannot work: patterns, devices, models."""
    device = find_device(resolved.settings.device)
    task: Task = resolved.build("task")
    settings = resolved.settings
    network = task.network()
    space = ParameterSpace.of(network, include=settings.include, exclude=settings.exclude)
    _check_sparsities(resolved, space)
    estimator, options = resolved.classes["estimator"], resolved.options["estimator"]
    estimator.check(network, space, options, available_memory(device))
    structures = dict(estimator.describe(space, options))
    memory = estimator.memory(space, options)
    return Preview(space, planned(resolved), memory, structures, resolved.as_dict(), str(device))


def _check_sparsities(resolved: ResolvedRun, space: ParameterSpace) -> None:
    pattern = resolved.build("pattern")
    for sparsity in resolved.sparsity:
        pattern.count(space, sparsity)


def planned(resolved: ResolvedRun) -> list[Step]:
    """The steps of a run."""
    settings = resolved.settings
    return plan(
        resolved.sparsity,
        resolved.build("schedule"),
        steps=settings.steps,
        substeps=settings.substeps,
        finetune=resolved.finetune.epochs > 0,
        independent=resolved.independent,
    )


def with_examples(resolved: ResolvedRun, task: Task) -> ResolvedRun:
    """The run with as many training examples as there are where nobody set a number, see `ResolvedRun.fitted`.

    Raises:
        DataError: more were asked for than there are; with the number that would do.
    """
    available, measured = task.size("train"), resolved.settings.split
    for split in ("train", measured):
        if not task.size(split):
            raise DataError(
                f"the task '{task.name}' has no examples in its {split} split: tuning and reporting take every second "
                "test example each, so a test set needs two at least; mend the data"
            )
    resolved = resolved.fitted(available)
    given = resolved.options["estimator"]
    assert isinstance(given, EstimatorSettings)
    if given.examples > available:
        most, name = given.fitting(available), resolved.classes["estimator"].name
        raise DataError(
            f"the estimator '{name}' needs {given.examples} calibration examples, the task '{task.name}' has "
            f"{available}; "
            + (f"set estimator.examples={most}, the most that will do" if most else "its other settings allow no fewer")
        )
    anchors = resolved.settings.reconstruction
    if anchors.how != "none" and anchors.examples > available:
        raise DataError(
            f"reconstruction needs {anchors.examples} training examples, the task '{task.name}' has {available}; set "
            f"reconstruction.examples={available} or less"
        )
    return resolved


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        record: as on disk.
        path: its directory.
        repeated: True where the run was finished before and nothing was done now.
        tracking_uri: where MLflow has it, or None.
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

    A finished run with the same identity is not done again. An interrupted one is an error unless `resume` (go
    on after its last whole step) or `fresh` (throw away what there is) is given. What the first update leaves behind
    is taken from `shared` where an earlier run of this process has left it there, and left there for later ones.

    Raises:
        SparsekitError: anything a user can mend.
    """
    settings = resolved.settings
    device = find_device(settings.device)
    uri = resolve_uri(settings.tracking.uri, Path(settings.output)) if settings.tracking.enabled else None
    shown = preview(resolved)
    task: Task = resolved.build("task")
    asked, resolved = resolved, with_examples(resolved, task)
    if resolved is not asked:
        settings, shown = resolved.settings, preview(resolved)
    estimator: CurvatureEstimator = resolved.build("estimator", shown.space)
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
        options: Any = resolved.options["estimator"]
        first = task.batches("train", batch_size=options.batch_size, limit=options.batch_size)
        Objective(model, task.likelihood, first, shown.space).check()  # nothing is written for what cannot work
        examples = task.batches("train", batch_size=options.batch_size, limit=options.examples)
        objective = Objective(model, task.likelihood, examples, shown.space)
        space, degraded = used(objective, included=settings.include is not None)
        if space is not shown.space:
            _check_sparsities(resolved, space)
            estimator = resolved.build("estimator", space)
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
        driver = _Driver(resolved, task, model, space, estimator, directory, record, uri, shared)
        finished = driver.run(resume and found is not None, listener, progress)
    return Outcome(finished, directory.path, False, uri if driver.untold is None else None)


def _tracked_at(record: RunRecord) -> str | None:
    """Where a finished run was tracked."""
    tracking = record.settings["tracking"]
    return resolve_uri(tracking["uri"], Path(record.settings["output"])) if tracking["enabled"] else None


class _Driver:
    """Drives one pruner and keeps record, checkpoint and tracking in step with it."""

    def __init__(
        self,
        resolved: ResolvedRun,
        task: Task,
        model: nn.Module,
        space: ParameterSpace,
        estimator: CurvatureEstimator,
        directory: RunDirectory,
        record: RunRecord,
        uri: str | None,
        shared: SharedStatistics | None,
    ) -> None:
        self.resolved, self.task, self.space = resolved, task, space
        self.directory, self.record, self.uri, self.shared = directory, record, uri, shared
        self.model, self.estimator = model, estimator
        self.plan = planned(resolved)
        self.saved = time.perf_counter()  # when the last checkpoint was written
        self.tracked: str | None = None  # MLflow's run, so that a resumed run goes on in it
        self.untold: str | None = None  # why MLflow was not told all of it

    def run(self, resume: bool, listener: Listener, progress: Progress) -> RunRecord:
        pruner = self._pruner(progress)
        if resume:
            self._restore(pruner)
        else:
            self.directory.checkpoints.clear()
        self.directory.write_settings(self.record.settings)
        self.directory.write(self.record)
        tracker = self._start_tracking()
        begun = time.perf_counter()
        earlier = self.record.seconds.get("total", self.record.seconds["prepare"])
        try:
            for event in pruner.run():
                listener(event)
                if isinstance(event, DenseMeasured):
                    seconds = {**self.record.seconds, "measure": event.seconds}
                    self._update(dense=dict(event.metrics), seconds=seconds)
                    tracker.metrics({f"dense/{k}": v for k, v in event.metrics.items()}, step=0)
                elif isinstance(event, LayerReconstructed):
                    if time.perf_counter() - self.saved > SAVE_EVERY:
                        spent = {**self.record.seconds, "total": earlier + time.perf_counter() - begun}
                        self.record = self.record.model_copy(update={"seconds": spent})
                        self._checkpoint(pruner)
                elif isinstance(event, StepCompleted):
                    self._completed(event, pruner, tracker, earlier + time.perf_counter() - begun)
            if self.record.dense:
                self._finish(pruner, tracker)
        except KeyboardInterrupt:
            tracker.finish("KILLED")
            raise
        except Exception:
            tracker.finish("FAILED")
            raise
        return self.record

    def _pruner(self, progress: Progress) -> Pruner:
        resolved, task = self.resolved, self.task
        options: Any = resolved.options["estimator"]

        def calibration(generator: torch.Generator) -> list[Batch]:
            if not options.examples:
                return []
            batches = task.batches("train", batch_size=options.batch_size, limit=options.examples, generator=generator)
            return list(batches)

        def anchors(generator: torch.Generator) -> list[Batch]:
            how = resolved.settings.reconstruction
            return list(task.batches("train", batch_size=how.batch_size, limit=how.examples, generator=generator))

        def training(generator: torch.Generator) -> Iterable[Batch]:
            return task.batches("train", batch_size=resolved.finetune.batch_size, generator=generator, augment=True)

        key = SharedStatistics.key(self.record.identity, type(self.estimator), options)

        def update(
            step: Step, estimator: CurvatureEstimator, objective: Objective, labels: torch.Generator
        ) -> Mapping[str, float]:
            if self.shared is None or step.index > 0:
                return estimator.update(objective, generator=labels)
            return self.shared.update(key, estimator, objective, labels)

        return Pruner(
            model=self.model,
            space=self.space,
            likelihood=task.likelihood,
            estimator=self.estimator,
            saliency=resolved.build("saliency"),
            pattern=resolved.build("pattern"),
            compensation=resolved.settings.compensation,
            steps=self.plan,
            calibration=calibration,
            measure=lambda model: task.measure(model, resolved.settings.split),
            seed=resolved.settings.seed,
            reconstruction=resolved.settings.reconstruction,
            anchors=anchors,
            finetune_settings=resolved.finetune,
            training=training,
            training_batches=math.ceil(task.size("train") / resolved.finetune.batch_size),
            update=update,
            progress=progress,
        )

    # -- the disk --------------------------------------------------------------------------------------
    def _update(self, **changes: Any) -> None:
        self.record = self.record.model_copy(update=changes)
        self.directory.write(self.record)

    def _checkpoint(self, pruner: Pruner) -> None:
        state = pruner.state
        assert state.mask is not None
        tensors: dict[str, Tensor] = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"estimator.{k}": v for k, v in pruner.estimator.state_dict().items()}
        tensors["mask"] = state.mask.kept
        self.directory.checkpoints.save(
            state.next_step,
            tensors,
            {
                "record": self.record.model_dump(mode="json"),
                "dense": state.dense,
                "tracked": self.tracked,
                "cut": None if state.cut is None else asdict(state.cut),
                "fits": [asdict(fit) for fit in state.fits],
            },
        )
        self.saved = time.perf_counter()

    def _restore(self, pruner: Pruner) -> None:
        found = self.directory.checkpoints.load()
        if found is None:
            return
        step, tensors, meta = found
        device = next(self.model.parameters()).device

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}

        cut = None if meta["cut"] is None else Cut(**meta["cut"])
        fits = tuple(LayerFit(**fit) for fit in meta["fits"])
        state = PrunerState(step, Mask(tensors["mask"].to(device)), meta["dense"], cut, fits)
        weights = {k: t.to(device) for k, t in part("model.").items()}
        # The estimator says where its own tensors lie: what it pages in from the host may not fit on the device.
        learned = {k: t.to(pruner.estimator.state_device(k, t, device)) for k, t in part("estimator.").items()}
        pruner.restore(weights, learned, state)
        self.record = RunRecord.model_validate(meta["record"])
        self.tracked = meta["tracked"]

    def _completed(self, event: StepCompleted, pruner: Pruner, tracker: NullTracker, total: float) -> None:
        step = StepRecord(
            index=event.step.index,
            sparsity=event.step.sparsity,
            removed=event.removed,
            refreshed=event.step.refresh,
            curvature=dict(event.curvature),
            damping=event.damping,
            predicted_increase=event.predicted_increase,
            measured_increase=event.measured_increase,
            iterations=event.iterations,
            residual=event.residual,
            reconstruction=None if event.reconstruction is None else asdict(event.reconstruction),
            pruned=None if event.pruned is None else dict(event.pruned),
            finetuned=None if event.finetuned is None else dict(event.finetuned),
            seconds=dict(event.seconds),
        )
        record = self.record
        levels, steps = list(record.levels), [*record.steps, step]
        if event.step.completes_level:
            levels.append(self._level(event, steps))
        seconds = dict(record.seconds)
        for phase, spent in event.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
        seconds["total"] = total
        self.record = record.model_copy(
            update={
                "levels": levels,
                "steps": steps,
                "seconds": seconds,
                "degraded": [*record.degraded, *degradations(event, pruner.compensation)],
                "peak_memory_bytes": max(record.peak_memory_bytes, peak_memory(self.model)),
            }
        )
        if event.step.completes_level:
            self._write_result(pruner)
        is_last = event.step.index + 1 == len(self.plan)
        if not is_last or sum(event.seconds.values()) > SAVE_EVERY:  # else sooner done again than written
            self._checkpoint(pruner)  # first the checkpoint, then the record that speaks of it
            self.directory.write(self.record)
        tracker.metrics(step_metrics(step, record.parameters["prunable"]), step=event.step.index)

    def _level(self, event: StepCompleted, steps: list[StepRecord]) -> LevelRecord:
        level = event.step.level
        mine = [done for done, planned in zip(steps, self.plan, strict=False) if planned.level == level]
        assert event.pruned is not None
        return LevelRecord(
            sparsity=self.resolved.sparsity[level],
            achieved=event.removed / self.space.size,
            achieved_total=event.removed / self.space.total,
            pruned=dict(event.pruned),
            finetuned=None if event.finetuned is None else dict(event.finetuned),
            predicted_increase=sum(s.predicted_increase for s in mine),
            measured_increase=sum(s.measured_increase for s in mine),
            reconstructed_increase=sum(s.reconstruction.increase for s in mine if s.reconstruction is not None),
            layer_sparsity=dict(event.layer_sparsity),
        )

    def _write_result(self, pruner: Pruner) -> None:
        assert pruner.state.mask is not None
        kept = self.space.unflatten(pruner.state.mask.kept)
        self.directory.write_result(self.space, self.model.state_dict(), kept)

    # -- tracking --------------------------------------------------------------------------------------
    def _start_tracking(self) -> NullTracker:
        if self.uri is None:
            return NullTracker()
        tracker = Tracker(self.uri, self.resolved.settings.tracking.experiment)
        begin(tracker, self.record, self.directory, self.tracked)
        if self.tracked is None:  # one that did not answer before is told what has been done since
            for step in self.record.steps:
                tracker.metrics(step_metrics(step, self.record.parameters["prunable"]), step=step.index)
        self.tracked = tracker.run_id
        return tracker

    def _finish(self, pruner: Pruner, tracker: NullTracker) -> None:
        conclude(tracker, self.record, self.directory)
        self._update(status="finished", finished=now(), files=self.directory.results(), **self._told(tracker))
        tracker.artifact(self.directory.record_path)
        tracker.finish("FINISHED")
        if self.untold is None and tracker.failure is not None:
            self._update(**self._told(tracker))
        self.directory.checkpoints.clear()

    def _told(self, tracker: NullTracker) -> dict[str, list[str]]:
        """What the record says of a tracker that has failed."""
        self.untold = tracker.failure
        if self.untold is None:
            return {}
        later = shlex.join(["sparsekit", "track", str(self.directory.path)])
        return {"degraded": [*self.record.degraded, f"tracking: {self.untold}. '{later}' tells MLflow later"]}


def degradations(event: StepCompleted, how: CompensationSettings) -> list[str]:
    """What went less well in a step, a sentence each with what to do."""
    found, step = [], f"step {event.step.index}"
    if how.how == "exact" and event.residual > how.tolerance:
        found.append(
            f"{step}: exact compensation stopped after {event.iterations} products, at the relative "
            f"residual {event.residual:.1e} ({how.tolerance:.0e} was asked for)"
        )
    if event.fell_back:
        found.append(
            f"{step}: {how.how} compensation came out worse than none, so the survivors stayed where they were; raise "
            f"the damping{' or compensation.max_iterations' if how.how == 'exact' else ''}"
        )
    if 0 <= event.loss < -event.predicted_increase:  # no loss here is negative; false where either is unknown
        found.append(
            f"{step}: the predicted change of the loss, {event.predicted_increase:.2g}, would take it below zero from "
            f"{event.loss:.2g}, so the quadratic model does not hold there and the gradient's step may ruin the "
            "network; use a larger estimator.damping, or compensation.first_order < 1 (and the saliency's)"
        )
    return [*found, *(f"{step}: {line}" for line in event.collapsed)]
