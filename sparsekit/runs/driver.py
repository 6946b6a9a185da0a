"""Runs one pruner, and writes its record, checkpoints and tracking."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict

import torch
from torch import Tensor, nn

from sparsekit.machine import now, peak_memory
from sparsekit.methods.interfaces import CurvatureEstimator, Task
from sparsekit.methods.schedules import Step
from sparsekit.problem.objective import Batch, Objective
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.pruning.events import Cut, DenseMeasured, Event, LayerReconstructed, PrunerState, StepCompleted
from sparsekit.pruning.pruner import Pruner
from sparsekit.reconstruction.fit import LayerFit
from sparsekit.runs.curvature_cache import SharedStatistics
from sparsekit.runs.degraded import degradations
from sparsekit.runs.directory import RunDirectory
from sparsekit.runs.preview import planned
from sparsekit.runs.publish import begin, conclude, step_metrics
from sparsekit.runs.schema import LevelRecord, RunRecord, StepRecord
from sparsekit.runs.settings import ResolvedRun
from sparsekit.runs.tracking import NullTracker, Tracker

#: Seconds between checkpoints within a step, while layers are reconstructed one by one.
SAVE_EVERY = 30.0

#: The prefix of a sentence in `degraded` that says that MLflow does not have all of the run.
UNTOLD = "tracking: "

Listener = Callable[[Event], None]
Progress = Callable[[str, int, int], None]


class Driver:
    """Runs one pruner, and writes its record, checkpoints and tracking."""

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
        self.tracked: str | None = None  # MLflow's run id, so that a resumed run continues it
        self.told = 0  # number of steps that MLflow has
        self.untold: str | None = None  # why MLflow does not have all of the run

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
        options = resolved.estimator.settings

        def calibration(generator: torch.Generator) -> list[Batch]:
            if not options.examples:
                return []
            batches = task.batches("train", batch_size=options.batch_size, limit=options.examples, generator=generator)
            return list(batches)

        def anchors(generator: torch.Generator) -> list[Batch]:
            how = resolved.settings.reconstruction
            return list(task.batches("train", batch_size=how.batch_size, limit=how.examples, generator=generator))

        def norm_examples(generator: torch.Generator) -> list[Batch]:
            how = resolved.settings.batch_norm
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

        def measure(model: nn.Module) -> dict[str, float]:
            found = dict(task.measure(model, resolved.settings.split))
            for split in resolved.settings.also_measured:
                found |= {f"{split}/{name}": value for name, value in task.measure(model, split).items()}
            return found

        return Pruner(
            model=self.model,
            space=self.space,
            likelihood=task.likelihood,
            estimator=self.estimator,
            saliency=resolved.saliency.build(),
            pattern=resolved.pattern.build(),
            compensation=resolved.settings.compensation,
            steps=self.plan,
            calibration=calibration,
            measure=measure,
            seed=resolved.settings.seed,
            reconstruction=resolved.settings.reconstruction,
            anchors=anchors,
            batch_norm=resolved.settings.batch_norm,
            norm_examples=norm_examples,
            finetune_settings=resolved.finetune,
            training=training,
            training_batches=math.ceil(task.size("train") / resolved.finetune.batch_size),
            update=update,
            progress=progress,
        )

    # -- the disk --------------------------------------------------------------------------------------
    def _update(self, **changes: object) -> None:
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
                "told": self.told,
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
        # The estimator chooses the devices of its tensors: those that it pages in from the host may not fit.
        learned = {k: t.to(pruner.estimator.state_device(k, t, device)) for k, t in part("estimator.").items()}
        pruner.restore(weights, learned, state)
        self.record = RunRecord.model_validate(meta["record"])
        self.tracked, self.told = meta["tracked"], meta.get("told", len(self.record.steps))

    def _completed(self, event: StepCompleted, pruner: Pruner, tracker: NullTracker, total: float) -> None:
        step = StepRecord.model_validate(event)
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
        tracker.metrics(step_metrics(step, record.parameters["prunable"]), step=event.step.index)
        if tracker.failure is None:
            self.told = len(steps)
        if event.step.completes_level:
            self._write_result(pruner)
        is_last = event.step.index + 1 == len(self.plan)
        if not is_last or sum(event.seconds.values()) > SAVE_EVERY:  # else repeating is faster than writing
            self._checkpoint(pruner)  # before the record, which describes it
            self.directory.write(self.record)

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
        if self.record.dense and not self.told:
            tracker.metrics({f"dense/{k}": v for k, v in self.record.dense.items()}, step=0)
        for step in self.record.steps[self.told :]:  # those that MLflow did not receive before
            tracker.metrics(step_metrics(step, self.record.parameters["prunable"]), step=step.index)
        if tracker.failure is None:
            self.told = len(self.record.steps)
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
        """The change of the record for a tracker that has failed."""
        self.untold = tracker.failure
        if self.untold is None:
            return {}
        later = shlex.join(["sparsekit", "track", str(self.directory.path)])
        return {"degraded": [*self.record.degraded, f"{UNTOLD}{self.untold}. '{later}' tells MLflow later"]}
