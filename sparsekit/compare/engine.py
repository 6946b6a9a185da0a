"""The engine of a comparison: plan, tune, run. Its whole state is on disk, so that it can be stopped and continued."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch.utils.flop_counter import FlopCounterMode

from sparsekit.compare import tuning
from sparsekit.compare.estimate import passes, seconds_of_an_example
from sparsekit.compare.executors import Executor, WorkerDied
from sparsekit.compare.plan import (
    PLAN,
    RUNS,
    TUNING,
    Comparison,
    Failure,
    Plan,
    PlannedRun,
    Trial,
    Tuned,
    Tuning,
    read,
    write,
)
from sparsekit.compare.spec import WORKER_BYTES, ComparisonSettings, Point, departures, expand, warnings
from sparsekit.compare.work import Job, do, failure_path
from sparsekit.errors import RecordError, SparsekitError
from sparsekit.machine import available_memory, find_device, gpus, now
from sparsekit.methods.interfaces import Task
from sparsekit.registry.registry import Registry
from sparsekit.runs.addresses import redacted
from sparsekit.runs.curvature_cache import SharedStatistics
from sparsekit.runs.directory import RunDirectory
from sparsekit.runs.identity import identity, plugins_used, sources
from sparsekit.runs.preview import preview, with_examples
from sparsekit.runs.schema import run_key
from sparsekit.runs.settings import ResolvedRun, merge, resolve

#: After so many deaths of workers in a row, without a finished step in between, a job is not started again.
DEATHS = 3

#: Callback for progress, called with (name of the work, done, total).
Tell = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Default callback: does nothing."""


@dataclass(frozen=True)
class Sketch:
    """A comparison's estimated cost, computed without training or pruning.

    Attributes:
        points: cells of the comparison.
        warnings: departures from the protocol.
        runs: number of points × seeds.
        trials: number of tuning runs.
        seconds: of all passes through the networks, on one worker; without solves and factorisations.
        memory: bytes that the worker of the largest run needs.
    """

    points: list[Point]
    warnings: list[str]
    runs: int
    trials: int
    seconds: float
    memory: int


def sketch(given: ComparisonSettings, registry: Registry) -> Sketch:
    """Validate all of a comparison, and estimate its cost.

    Raises:
        SparsekitError: a point cannot work; the message says which.
    """
    points = expand(given, registry)
    searches = tuning.searches(given, points, Path())
    once = {str(p.settings.get("task")): p for p in points}
    speed = {task: seconds_of_an_example(point.resolved) for task, point in once.items()}
    seconds, seen = 0.0, set()
    for point in points:
        estimate = str((point.settings.get("task"), point.settings["estimator"]))
        cost = passes(point.resolved, shared=estimate in seen) * speed[str(point.settings.get("task"))]
        seconds += cost * len(given.seeds)
        seen.add(estimate)
    for search in searches:
        resolved = resolve(search.settings, registry)
        one = passes(resolved, shared=True) * speed[str(search.settings.get("task"))]
        seconds += one * search.tune.trials
    return Sketch(
        points=points,
        warnings=warnings(given, points),
        runs=len(points) * len(given.seeds),
        trials=len(searches) * (given.tune.trials if given.tune else 0),
        seconds=seconds,
        memory=max(_memory(point) for point in points),
    )


def _memory(point: Point) -> int:
    """The most bytes that a worker needs for a point's run; raises a SparsekitError if the run cannot work."""
    try:
        needed = preview(with_examples(point.resolved, point.resolved.task.build())).memory
    except SparsekitError as error:
        raise type(error)(f"{point.name}: {error}") from error
    fitting = point.resolved.settings.reconstruction
    return WORKER_BYTES + needed + (fitting.cache_mebibytes << 20 if fitting.how != "none" else 0)


def workers_for(cores: int, memory: int, threads: int, device: torch.device) -> int:
    """As many workers as cores and free memory allow; one a GPU, because runs would compete for its memory."""
    if device.type != "cpu":
        return max(1, len(gpus(device)))
    return max(1, min(cores // threads, int(0.9 * available_memory(device).host // memory)))


def _shown(given: ComparisonSettings) -> dict[str, object]:
    """The file as the plan and the report show it, without secrets in addresses."""
    plain = given.model_dump(mode="json")
    if given.tracking.uri is not None:
        plain["tracking"]["uri"] = redacted(given.tracking.uri)
    return plain


# -- the comparison ----------------------------------------------------------------------------------------
class Engine:
    """Runs one comparison in its directory.

    Attributes:
        given: the contents of the file.
        directory: of all its files.
        finished: called with each run as soon as it is finished.
        tell: called with progress.
    """

    def __init__(
        self,
        given: ComparisonSettings,
        directory: Path,
        registry: Registry,
        *,
        finished: Callable[[PlannedRun], None] = lambda run: None,
        tell: Tell = silent,
    ) -> None:
        self.given, self.directory, self.registry = given, directory, registry
        self.finished, self.tell = finished, tell
        self._sources: dict[str, tuple[Task, dict[str, str], dict[str, float]]] = {}

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the comparison's directory.

        Raises:
            RecordError: another process has locked it, or it cannot be written.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.directory / ".lock")
            lock.acquire(timeout=0)
        except Timeout:
            raise RecordError(
                f"another 'sparsekit compare' is at work in '{self.directory}'; wait for it, stop it, or give another "
                "--output"
            ) from None
        except OSError as error:
            raise RecordError(
                f"cannot write to '{self.directory}': {error.strerror}; give another --output, or mend its permissions"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def run(self, executor: Executor, *, again: bool = False) -> Comparison:
        """Do all runs that are not finished; with `again` also those that have failed.

        Raises:
            SparsekitError: the comparison cannot begin, or its directory cannot be written any more.
        """
        points = expand(self.given, self.registry)
        tuned = self._tune(points, executor, again)
        plan = self.plan(points, tuned)
        write(plan, self.directory / PLAN)
        found = Comparison.load(self.directory)
        done = [run for run in plan.runs if found.finished(run)]
        for run in done:
            self.finished(run)
        open_runs = [run for run in plan.runs if not found.finished(run)]
        todo = [run for run in open_runs if not run.lost and (again or run.directory not in found.failures)]
        for run in todo:
            failure_path(self.directory, run).unlink(missing_ok=True)  # it is out of date from now on
        self._work([Job(self.directory, runs, again) for runs in self._grouped(todo)], len(plan.runs), executor)
        return Comparison.load(self.directory)

    def _tune(self, points: Sequence[Point], executor: Executor, again: bool) -> list[Tuned]:
        tune = self.given.tune
        if tune is None:
            (self.directory / TUNING).unlink(missing_ok=True)
            return []
        jobs = tuning.searches(self.given, points, self.directory)
        made_of = []
        for job in jobs:
            resolved = resolve(job.settings, self.registry)
            _, found, _ = self._source(resolved)  # trains the dense network once, here, not in each worker
            made_of.append({**found, "plugins": plugins_used(resolved, self.registry)})
        key = tuning.key_of(jobs, made_of)
        before = read(Tuning, self.directory / TUNING)
        if before is not None and before.key == key and not (again and any(map(tuning.failed, before.tuned))):
            return before.tuned
        self.tell("tuning", 0, len(jobs))
        futures = [executor.submit(tuning.search, job) for job in jobs]
        tuned = []
        for done, (job, future) in enumerate(zip(jobs, futures, strict=True), 1):
            tuned.append(self._survived(executor, job, future))
            self.tell("tuning", done, len(jobs))
        write(tuning.told(self.given, points, tuned, key), self.directory / TUNING)
        return tuned

    def _survived(self, executor: Executor, job: tuning.Search, future: Future[Tuned]) -> Tuned:
        """The result of a search; a job whose worker died is submitted again, as long as steps get done."""
        before, deaths = -1, 0
        while True:
            try:
                return future.result()
            except WorkerDied as error:
                steps = tuning.steps(job, self.registry)
                before, deaths = steps, deaths + 1 if steps == before else 1
                if deaths == DEATHS:
                    lost = Trial(damping=math.nan, value=-math.inf, cause=f"{error} ({DEATHS} times)")
                    return Tuned(axes=dict(job.axes), trials=[lost], damping=None)
                future = executor.submit(tuning.search, job)

    def plan(self, points: Sequence[Point], tuned: Sequence[Tuned]) -> Plan:
        """The plan: all runs, with the directories of their records."""
        runs = []
        for point in points:
            settings = tuning.settled(point, self.given.tune, tuned)
            changed = replace(point, settings=settings, resolved=resolve(settings, self.registry))
            memory, differs = _memory(changed), departures(changed, self.registry)
            lost = tuning.lost(point, self.given.tune, tuned)
            for seed in self.given.seeds:
                own: dict[str, object] = {"seed": seed}
                if self.given.networks == "each":
                    own["task"] = {"name": changed.resolved.task.cls.name, "seed": seed}
                seeded = merge(settings, own)
                run = resolve({**seeded, "output": str(self.directory / RUNS)}, self.registry)
                task, found, _ = self._source(run)
                run = with_examples(run, task)
                key = run_key(identity(run, self.registry, found))
                path = RunDirectory.of(Path(RUNS), task.name, run.estimator.cls.name, key).path
                runs.append(
                    PlannedRun(
                        axes=point.axes,
                        seed=seed,
                        directory=str(path),
                        settings=seeded,
                        departures=differs,
                        memory_bytes=memory,
                        lost=lost,
                    )
                )
        return Plan(
            name=self.given.name,
            file=_shown(self.given),
            reference=self.given.reference or _magnitude(points),
            warnings=warnings(self.given, points),
            seeds_vary=["the dense network"] * (self.given.networks == "each") + _varies(points),
            seeds_share=[]
            if self.given.networks == "each"
            else ["the dense network: the bands show calibration noise, not that of training anew"],
            judged={task.name: task.size(points[0].resolved.settings.split) for task, _, _ in self._sources.values()},
            multiply_adds={task.name: adds for task, _, adds in self._sources.values()},
            runs=runs,
        )

    def _source(self, resolved: ResolvedRun) -> tuple[Task, dict[str, str], dict[str, float]]:
        """The task, hashes of its dense network and data, and multiply-adds; the network is trained at first use."""
        key = str(resolved.as_dict()["task"])
        if key not in self._sources:
            task = resolved.task.build()
            task.device = find_device(resolved.settings.device)
            task.progress = lambda done, total: self.tell(f"preparing {task.name}", done, total)
            model = task.model()
            self._sources[key] = task, sources(task, model), multiply_adds(task, model)
        return self._sources[key]

    def _grouped(self, runs: Sequence[PlannedRun]) -> list[tuple[PlannedRun, ...]]:
        """The runs in groups that can share curvature statistics, in the plan's order."""
        groups: dict[str, list[PlannedRun]] = {}
        for run in runs:
            resolved = resolve(run.settings, self.registry)
            task, found, _ = self._source(resolved)
            resolved = with_examples(resolved, task)
            of = identity(resolved, self.registry, found)
            key = SharedStatistics.key(of, resolved.estimator.cls, resolved.estimator.settings)
            groups.setdefault(key, []).append(run)
        return [tuple(group) for group in groups.values()]

    def _work(self, jobs: Sequence[Job], total: int, executor: Executor) -> None:
        waiting: dict[Future[None], Job] = {executor.submit(do, job): job for job in jobs}
        todo = {run.directory: run for job in jobs for run in job.runs}
        deaths: dict[Job, tuple[int, int]] = {}
        self.tell("runs", total - len(todo), total)
        while waiting:
            done, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                job = waiting.pop(future)
                try:
                    future.result()
                except WorkerDied as error:
                    steps = sum(self._steps(run) for run in job.runs)
                    before, count = deaths.get(job, (-1, 0))
                    deaths[job] = steps, count + 1 if steps == before else 1
                    if deaths[job][1] < DEATHS:
                        waiting[executor.submit(do, job)] = job
                    else:
                        self._blame(job, str(error), executor, waiting)
            for directory in [d for d in todo if self._is_finished(d)]:
                self.finished(todo.pop(directory))
                self.tell("runs", total - len(todo), total)

    def _blame(self, job: Job, cause: str, executor: Executor, waiting: dict[Future[None], Job]) -> None:
        """Record a failure of the first run that is not done, whose workers died, and resubmit the others."""
        rest = [run for run in job.runs if not self._is_finished(run.directory)]
        rest = [run for run in rest if not failure_path(self.directory, run).exists()]
        if rest:
            write(Failure(cause=f"{cause} ({DEATHS} times)", when=now()), failure_path(self.directory, rest[0]))
        if rest[1:]:
            left = replace(job, runs=tuple(rest[1:]))
            waiting[executor.submit(do, left)] = left

    def _steps(self, run: PlannedRun) -> int:
        try:
            record = RunDirectory(self.directory / run.directory).read()
        except RecordError:
            return 0
        return 0 if record is None else 1 + len(record.steps)

    def _is_finished(self, directory: str) -> bool:
        path = self.directory / directory
        if not (path / "mask.safetensors").exists():  # saves reading the record of an unfinished run
            return False
        try:
            record = RunDirectory(path).read()
            if record is None or record.status != "finished":
                return False
            RunDirectory(path).check_results(record)
        except RecordError:
            return False
        return True


def _varies(points: Sequence[Point]) -> list[str]:
    """What differs between two seeds of a point, in words."""
    runs = [point.resolved for point in points]
    fitted = any(run.settings.reconstruction.how != "none" for run in runs)
    trained = any(run.finetune.epochs for run in runs)
    out = ["calibration examples", "drawn labels", "random saliencies"]
    return out + ["examples of reconstruction"] * fitted + ["order of fine-tuning"] * trained


def _magnitude(points: Sequence[Point]) -> str | None:
    found = (p.method for p in points if p.resolved.saliency.cls.name == "magnitude")
    return next(found, None)


def multiply_adds(task: Task, model: torch.nn.Module) -> dict[str, float]:
    """Parameter name -> multiply-adds of a module's weight in one example's forward pass."""
    inputs, _ = next(iter(task.batches("train", batch_size=1, limit=1)))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(inputs)
    names = {name: module for name, module in model.named_modules() if getattr(module, "weight", None) is not None}
    counts: Mapping[str, Mapping[Any, int]] = counter.get_flop_counts()
    root = type(model).__name__
    out = {}
    for name in names:
        flops = sum(counts.get(f"{root}.{name}", {}).values())
        if flops:
            out[f"{name}.weight"] = flops / 2
    return out
