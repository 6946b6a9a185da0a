"""A comparison's records, grouped: tasks, their points, and each point's results over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from sparsekit.compare.plan import Comparison, PlannedRun, Tuning
from sparsekit.report.spread import Metric, Spread, percent
from sparsekit.runs.schema import LevelRecord, RunRecord

Phase = Literal["pruned", "finetuned"]

#: Axes that every table shows, whether they vary or not.
SHOWN = ("method", "reconstruction")

#: Networks with fewer prunable weights are called small, and so are these tasks, whose data are.
SMALL_NETWORK, SMALL_TASKS = 100_000, ("digits", "digits-transformer", "mnist")


@dataclass(frozen=True, eq=False)
class Point:
    """A row of the tables: one value of each axis, within a task.

    Attributes:
        axes: axis -> value, without the task.
        label: the axes that vary within the task, in words.
        short: the same without reconstruction, for panels that name it.
        planned: its seeds.
        runs: seed -> record, of the finished runs.
        tuning: 'tuned', 'untuned', 'as published', or '' where there is nothing to tune.
    """

    axes: Mapping[str, str]
    label: str
    short: str
    planned: tuple[int, ...]
    runs: Mapping[int, RunRecord]
    tuning: str

    @property
    def method(self) -> str:
        """The method's name."""
        return self.axes["method"]

    def levels(self, sparsity: float) -> dict[int, tuple[RunRecord, LevelRecord]]:
        """Seed -> (run, its level of this sparsity)."""
        found = {}
        for seed, record in self.runs.items():
            for level in record.levels:
                if math.isclose(level.sparsity, sparsity, abs_tol=1e-9):
                    found[seed] = (record, level)
        return found

    def figures(self, sparsity: float, read: Callable[[RunRecord, LevelRecord], float | None]) -> dict[int, float]:
        """Seed -> the result of `read`, where it is not None."""
        values = {seed: read(*found) for seed, found in self.levels(sparsity).items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def metric(self, metric: Metric, sparsity: float, phase: Phase) -> dict[int, float]:
        """Seed -> the metric after the cut, or after fine-tuning."""

        def read(_: RunRecord, level: LevelRecord) -> float | None:
            figures = level.pruned if phase == "pruned" else level.finetuned
            return None if figures is None else figures.get(metric.name)

        return self.figures(sparsity, read)

    @property
    def is_second_order(self) -> bool:
        """Whether its mask or its compensation depends on curvature."""
        if not self.runs:
            return False
        settings = next(iter(self.runs.values())).settings
        if settings["estimator"]["name"] == "identity":
            return False
        blind = settings["saliency"]["name"] in ("magnitude", "random")
        return not (blind and settings["compensation"]["how"] == "none")


@dataclass(frozen=True, eq=False)
class TaskSummary:
    """The results of one task.

    Attributes:
        name: of the task.
        metric: of the tables: accuracy where there is one, else the first metric of the dense network.
        points: in the plan's order.
        sparsities: increasing.
        shown: axes that tables show: method, reconstruction, and the others that vary.
        dense: metric -> its spread over seeds, of the dense network.
        hashes: of the dense weights, one for each dense network.
        mixed: seeds for which not all points started from the same dense weights.
        sizes: (prunable weights, all parameters), as the records have them.
        multiply_adds: parameter -> multiply-adds of one example's forward pass, dense; empty: not known.
        splits: of the examples that metrics were measured on.
    """

    name: str
    metric: Metric
    points: tuple[Point, ...]
    sparsities: tuple[float, ...]
    shown: tuple[str, ...]
    dense: Mapping[str, Spread]
    hashes: tuple[str, ...]
    mixed: tuple[int, ...]
    sizes: tuple[int, int]
    multiply_adds: Mapping[str, float]
    splits: tuple[str, ...]

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """Pruned, and finetuned if any run was fine-tuned."""
        records = [record for point in self.points for record in point.runs.values()]
        tuned = any(level.finetuned is not None for record in records for level in record.levels)
        return ("pruned", "finetuned") if tuned else ("pruned",)

    @property
    def is_small(self) -> bool:
        """Whether it is too small to conclude much for networks in practical use."""
        return self.name in SMALL_TASKS or 0 < self.sizes[0] < SMALL_NETWORK

    @property
    def middle(self) -> float:
        """The middle one of the requested sparsities."""
        return self.sparsities[len(self.sparsities) // 2]

    def remaining(self, level: LevelRecord) -> float | None:
        """The remaining multiply-adds as a fraction of the dense network's; theoretical."""
        total = sum(self.multiply_adds.values())
        if not total:
            return None
        kept = sum(n * (1 - level.layer_sparsity.get(name, 0.0)) for name, n in self.multiply_adds.items())
        return kept / total

    def ranked(self, sparsity: float, phase: Phase) -> list[Point]:
        """Points with a finite mean over the most seeds, the best first; ties in the plan's order."""
        found = {point: Spread.of(point.metric(self.metric, sparsity, phase)) for point in self.points}
        spreads = {p: spread for p, spread in found.items() if spread is not None and math.isfinite(spread.mean)}
        most = max((spread.n for spread in spreads.values()), default=0)
        means = {p: self.metric.gain(spread.mean) for p, spread in spreads.items() if spread.n == most}
        return sorted(means, key=means.__getitem__, reverse=True)


@dataclass(frozen=True, eq=False)
class State:
    """A planned run and its state: 'finished', 'failed' or 'unfinished'."""

    run: PlannedRun
    record: RunRecord | None
    state: Literal["finished", "failed", "unfinished"]


@dataclass(frozen=True, eq=False)
class Summary:
    """A comparison, grouped by task and point.

    Attributes:
        comparison: its records.
        states: of all planned runs, in the plan's order.
        tasks: those with at least one finished run.
        empty: names of the other tasks.
    """

    comparison: Comparison
    states: tuple[State, ...]
    tasks: tuple[TaskSummary, ...]
    empty: tuple[str, ...]

    def count(self, state: str) -> int:
        """Planned runs in this state."""
        return sum(entry.state == state for entry in self.states)


def summarise(comparison: Comparison) -> Summary:
    """Group a comparison's records by task and point."""
    states = tuple(_state(comparison, run) for run in comparison.plan.runs)
    by_task: dict[str, list[State]] = {}
    for state in states:
        by_task.setdefault(state.run.axes["task"], []).append(state)
    done = {name: any(s.state == "finished" for s in entries) for name, entries in by_task.items()}
    tasks = tuple(_task(comparison, name, entries) for name, entries in by_task.items() if done[name])
    return Summary(comparison, states, tasks, tuple(name for name in by_task if not done[name]))


def _state(comparison: Comparison, run: PlannedRun) -> State:
    record = comparison.records.get(run.directory)
    if comparison.finished(run):
        return State(run, record, "finished")  # an earlier failure is out of date
    return State(run, record, "failed" if run.directory in comparison.failures else "unfinished")


def _task(comparison: Comparison, name: str, states: Sequence[State]) -> TaskSummary:
    records = [s.record for s in states if s.record is not None and s.state == "finished"]
    names = list(records[0].dense)
    weights: dict[int, set[str]] = {}
    for state in states:
        if state.record is not None:
            weights.setdefault(state.run.seed, set()).add(str(state.record.identity.get("weights", "")))
    dense = {n: {s.run.seed: s.record.dense[n] for s in states if s.record and n in s.record.dense} for n in names}
    shown = _shown(states)
    return TaskSummary(
        name=name,
        metric=Metric("accuracy", _resolution(comparison, name)) if "accuracy" in names else Metric(names[0]),
        points=_points(states, shown, comparison.tuning),
        sparsities=tuple(sorted({round(level.sparsity, 10) for record in records for level in record.levels})),
        shown=shown,
        dense={n: spread for n, values in dense.items() if (spread := Spread.of(values)) is not None},
        hashes=tuple(sorted(set().union(*weights.values()) - {""})),
        mixed=tuple(sorted(seed for seed, hashes in weights.items() if len(hashes) > 1)),
        sizes=(int(records[0].parameters["prunable"]), int(records[0].parameters["total"])),
        multiply_adds=comparison.plan.multiply_adds.get(name, {}),
        splits=tuple(sorted({str(record.settings.get("split", "reporting")) for record in records})),
    )


def _resolution(comparison: Comparison, task: str) -> float:
    examples = comparison.plan.judged.get(task, 0)
    return 1 / examples if examples else 0.0


def _shown(states: Sequence[State]) -> tuple[str, ...]:
    axes = dict.fromkeys(axis for s in states for axis in s.run.axes if axis != "task")
    varies = {axis: len({s.run.axes.get(axis) for s in states}) > 1 for axis in axes}
    return tuple(axis for axis in axes if varies[axis] or axis in SHOWN)


def _points(states: Sequence[State], shown: Sequence[str], tuning: Tuning | None) -> tuple[Point, ...]:
    groups: dict[tuple[tuple[str, str], ...], list[State]] = {}
    for state in states:
        groups.setdefault(tuple(state.run.axes.items()), []).append(state)
    points = []
    for key, entries in groups.items():
        axes = dict(key)
        points.append(
            Point(
                axes={axis: value for axis, value in axes.items() if axis != "task"},
                label=label(axes, shown),
                short=label(axes, [axis for axis in shown if axis != "reconstruction"]),
                planned=tuple(s.run.seed for s in entries),
                runs={s.run.seed: s.record for s in entries if s.state == "finished" and s.record is not None},
                tuning=_tuning(axes, entries[0].run, tuning),
            )
        )
    return tuple(points)


def label(axes: Mapping[str, str], shown: Sequence[str]) -> str:
    """The values of the axes in words: 'fishleg, joint compensation, no reconstruction'."""
    words = []
    for axis in shown:
        value = axes.get(axis, "–")
        if axis == "method":
            words.append(value)
        elif axis in ("compensation", "reconstruction"):
            words.append(f"{'no' if value == 'none' else value} {axis}")
        else:
            words.append(f"{axis} {value}")
    return ", ".join(words)


def _tuning(axes: Mapping[str, str], run: PlannedRun, tuning: Tuning | None) -> str:
    if tuning is not None:
        if axes["method"] in tuning.untuned:
            return ""
        for found in tuning.tuned:
            if found.damping is not None and found.axes.items() <= axes.items():
                return "tuned"
    if run.settings.get("estimator") in ("identity", {"name": "identity"}):
        return ""
    return "as published" if run.settings.get("preset") and not run.departures else "untuned"


def asked(sparsities: Sequence[float]) -> list[str]:
    """Column headings for sparsities."""
    return [percent(sparsity) for sparsity in sparsities]
