"""Tuning: every method gets the same number of trials, over the same range of dampings, on the tuning half."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.compare.plan import TRIALS, Trial, Tuned, Tuning
from sparsekit.compare.spec import ComparisonSettings, Point, TuningSettings
from sparsekit.compare.work import one
from sparsekit.errors import RecordError, SparsekitError
from sparsekit.registry.registry import Registry
from sparsekit.runs.curvature_cache import SharedStatistics
from sparsekit.runs.directory import RunDirectory
from sparsekit.runs.schema import RunRecord, run_key
from sparsekit.runs.settings import merge, resolve


@dataclass(frozen=True)
class Search:
    """A search for one method's damping, done by one worker.

    Attributes:
        directory: of the comparison.
        axes: the task, the method and the values of the axes in `over`.
        settings: of its runs.
        tune: how dampings are searched.
    """

    directory: Path
    axes: Mapping[str, str]
    settings: Mapping[str, object]
    tune: TuningSettings


def searches(given: ComparisonSettings, points: Sequence[Point], directory: Path) -> list[Search]:
    """One search for each method and value of the axes in `over`, at the first value of the other axes."""
    tune = given.tune
    if tune is None:
        return []
    found: dict[str, Search] = {}
    for point in points:
        if point.tunable:
            axes = place(point, tune)
            settings = {"sparsity": list(tune.sparsity)} if tune.sparsity else {}
            raw = merge(point.settings, settings, {"split": "tuning", "seed": tune.seed})
            found.setdefault(str(axes), Search(directory, axes, raw, tune))
    return list(found.values())


def place(point: Point, tune: TuningSettings) -> dict[str, str]:
    """The axes of a point's search: its task, its method, and its value of each axis in `over`."""
    return {axis: value for axis, value in point.axes.items() if axis in ("task", "method", *tune.over)}


def search(job: Search) -> Tuned:
    """Do all trials of one search; finished ones are read from disk."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tune, shared = job.tune, SharedStatistics()
    ratio = (tune.high / tune.low) ** (1 / (tune.trials - 1))
    grid = [tune.low * ratio**i for i in range(tune.trials)]
    sampler: optuna.samplers.BaseSampler = (
        optuna.samplers.GridSampler({"damping": grid}, seed=tune.seed)
        if tune.sampler == "grid"
        else optuna.samplers.TPESampler(seed=tune.seed)
    )
    trials = []

    def tried(asked: optuna.Trial) -> float:
        damping = float(f"{asked.suggest_float('damping', tune.low, tune.high, log=True):.3g}")
        settings = merge(job.settings, damped(damping))
        try:
            value, cause = worth(one(job.directory / TRIALS, settings, shared, again=True)), ""
        except Exception as error:  # a bug, ours or a plugin's, makes the trial fail, as it would a run
            name = "" if isinstance(error, SparsekitError) else f"{type(error).__name__}: "
            value, cause = -math.inf, f"{name}{error}"
        trials.append(Trial(damping=damping, value=value, cause=cause))
        if not math.isfinite(value):
            raise optuna.TrialPruned(cause)
        return value

    optuna.create_study(direction="maximize", sampler=sampler).optimize(tried, n_trials=tune.trials)
    best = max(trials, key=lambda trial: trial.value)
    chosen = best.damping if math.isfinite(best.value) else None
    return Tuned(axes=dict(job.axes), trials=sorted(trials, key=lambda trial: trial.damping), damping=chosen)


def worth(record: RunRecord) -> float:
    """The mean over levels of the final accuracy, or of −loss where the task has no accuracy."""
    last = [level.finetuned or level.pruned for level in record.levels]
    values = [metrics["accuracy"] if "accuracy" in metrics else -metrics["loss"] for metrics in last]
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else -math.inf


def damped(damping: float) -> dict[str, dict[str, object]]:
    """Settings of a run with this damping, in units of the mean of diag F."""
    return {"estimator": {"damping": damping, "damping_scale": "relative"}}


def key_of(jobs: Sequence[Search], made_of: Sequence[Mapping[str, object]]) -> str:
    """A hash of all that tuning depends on; `made_of` are the hashes and versions behind each search."""
    searched = [[job.axes, job.settings, job.tune.model_dump(mode="json")] for job in jobs]
    return run_key({"searches": searched, "made of": list(made_of)})


def steps(job: Search, registry: Registry) -> int:
    """The progress of a search: the number of begun runs of its trials plus their steps."""
    own = _but_damping(resolve(job.settings, registry).as_dict())
    count = 0
    for path in (job.directory / TRIALS).glob("*/record.json"):
        try:
            record = RunDirectory(path.parent).read()
        except RecordError:
            continue
        if record is not None and _but_damping(record.settings) == own:
            count += 1 + len(record.steps)
    return count


def _but_damping(settings: Mapping[str, Any]) -> str:
    """A hash of the settings that all runs of a search share."""
    estimator = {k: v for k, v in settings["estimator"].items() if k not in damped(0.0)["estimator"]}
    rest = {key: value for key, value in settings.items() if key not in ("output", "tracking")}
    return run_key({**rest, "estimator": estimator})


def failed(tuned: Tuned) -> bool:
    """Whether a trial failed, or no damping was found."""
    return tuned.damping is None or any(trial.cause for trial in tuned.trials)


def told(given: ComparisonSettings, points: Sequence[Point], tuned: Sequence[Tuned], key: str) -> Tuning:
    """The results of tuning, as they are stored."""
    tune = given.tune
    assert tune is not None
    levels = f"the sparsities {', '.join(map(str, tune.sparsity))}" if tune.sparsity else "all sparsities"
    return Tuning(
        key=key,
        objective=f"mean accuracy (or −loss) over {levels} on the tuning half; {tune.trials} dampings from "
        f"{tune.low:g} to {tune.high:g} times the mean of diag F; seed {tune.seed}",
        tuned=list(tuned),
        untuned=sorted({point.method for point in points if not point.tunable}),
    )


def settled(point: Point, tune: TuningSettings | None, tuned: Sequence[Tuned]) -> dict[str, object]:
    """A point's settings with the damping found for it; if none was found, see `lost`."""
    if tune is None or not point.tunable:
        return dict(point.settings)
    found = _of(point, tune, tuned).damping
    return merge(point.settings, {} if found is None else damped(found))


def lost(point: Point, tune: TuningSettings | None, tuned: Sequence[Tuned]) -> str:
    """Why the search found no damping for a point; empty where it found one or none is needed."""
    if tune is None or not point.tunable:
        return ""
    found = _of(point, tune, tuned)
    return "" if found.damping is not None else f"no damping was found for it: {found.trials[0].cause}"


def _of(point: Point, tune: TuningSettings, tuned: Sequence[Tuned]) -> Tuned:
    [found] = [one for one in tuned if one.axes == place(point, tune)]
    return found
