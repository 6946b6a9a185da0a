"""The results as data: those of every run in CSV, aggregated ones in JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

from sparsekit.report.attribution import difference, parts, references
from sparsekit.report.ledger import PARTS, curvature_examples, peak_mebibytes, seconds, shared_seconds
from sparsekit.report.spread import Difference, Metric, Spread
from sparsekit.report.summary import Phase, Point, State, Summary, TaskSummary
from sparsekit.runs.schema import LevelRecord, RunRecord


def results_csv(summary: Summary) -> str:
    """One row for each finished run, level and phase, in the plan's order.

    No column depends on time, so that two executions of one comparison give the same bytes.
    """
    axes, metrics = _axes(summary), _metrics(summary)
    tasks = {task.name: task for task in summary.tasks}
    figures = [*metrics, *(f"dense_{name}" for name in metrics)]
    heads = (*axes, "seed", "sparsity", "phase", "achieved", "achieved_total", *figures)
    heads = (*heads, "predicted_increase", "measured_increase", "reconstructed_increase", "multiply_adds_remaining")
    rows = []
    for state, record in _finished(summary):
        for level, phase, reached in _phases(record):
            values = [*(reached.get(name) for name in metrics), *(record.dense.get(name) for name in metrics)]
            known = (level.predicted_increase, level.measured_increase, level.reconstructed_increase)
            remaining = tasks[state.run.axes["task"]].remaining(level)
            place = (level.sparsity, phase, level.achieved, level.achieved_total)
            rows.append((*_place(state, axes), *place, *values, *known, remaining))
    return _csv(heads, rows)


def costs_csv(summary: Summary) -> str:
    """One row for each finished run: seconds by part, memory, examples."""
    axes = _axes(summary)
    spent = [f"{part}_seconds" for part in PARTS]
    heads = (*axes, "seed", *spent, "shared_seconds", "peak_mebibytes", "curvature_examples", "curvature_estimates")
    rows = []
    for state, record in _finished(summary):
        cost = (*(seconds(record, part) for part in PARTS), shared_seconds(record), peak_mebibytes(record))
        rows.append((*_place(state, axes), *cost, *curvature_examples(record)))
    return _csv(heads, rows)


def _axes(summary: Summary) -> list[str]:
    return list(dict.fromkeys(axis for state in summary.states for axis in state.run.axes))


def _metrics(summary: Summary) -> list[str]:
    return list(dict.fromkeys(name for _, record in _finished(summary) for name in record.dense))


def _finished(summary: Summary) -> Iterator[tuple[State, RunRecord]]:
    for state in summary.states:
        if state.state == "finished" and state.record is not None:
            yield state, state.record


def _phases(record: RunRecord) -> Iterator[tuple[LevelRecord, Phase, Mapping[str, float]]]:
    for level in record.levels:
        yield level, "pruned", level.pruned
        if level.finetuned is not None:
            yield level, "finetuned", level.finetuned


def _place(state: State, axes: Sequence[str]) -> tuple[object, ...]:
    return (*(state.run.axes.get(axis, "") for axis in axes), state.run.seed)


def _csv(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return buffer.getvalue()


def _cell(value: object) -> object:
    """The value; text that a spreadsheet would read as a formula is marked as text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def results_json(summary: Summary) -> str:
    """The aggregated results as strict JSON: null where a number is not finite."""
    plan = summary.comparison.plan
    content = {
        "name": plan.name,
        "reference": plan.reference,
        "runs": {"planned": len(summary.states), **{s: summary.count(s) for s in ("finished", "failed", "unfinished")}},
        "tasks": [_task(task, plan.reference) for task in summary.tasks],
    }
    return json.dumps(_plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _task(task: TaskSummary, reference: str | None) -> dict[str, object]:
    other = references(task, reference) if reference is not None else {}
    paired = [
        (point, base, s, phase) for point, base in other.items() for s in task.sparsities for phase in task.phases
    ]
    return {
        "task": task.name,
        "metric": task.metric.name,
        "prunable": task.sizes[0],
        "parameters": task.sizes[1],
        "weights": list(task.hashes),
        "dense": {name: vars(spread) for name, spread in task.dense.items()},
        "points": [_point(task, point) for point in task.points],
        "against_reference": [
            {"axes": point.axes, "reference": base.axes, "sparsity": s, "phase": phase}
            | _difference(task.metric, difference(point, base, task.metric, s, phase))
            for point, base, s, phase in paired
        ],
        "parts": _parts(task, reference),
    }


def _parts(task: TaskSummary, reference: str | None) -> list[dict[str, object]]:
    return [
        {"method": part.method, "part": part.kind, "where": part.where, "missing": part.missing or None}
        | {"sparsity": s, "phase": phase}
        | _difference(task.metric, part.difference(task.metric, s, phase))
        for part in parts(task, reference)
        for s in task.sparsities
        for phase in task.phases
    ]


def _point(task: TaskSummary, point: Point) -> dict[str, object]:
    return {
        "axes": point.axes,
        "tuning": point.tuning or None,
        "seeds": {"planned": list(point.planned), "finished": sorted(point.runs)},
        "levels": [_level(task, point, s) for s in task.sparsities],
        "cost": {
            **{f"{part}_seconds": _over(point, partial(seconds, part=part)) for part in PARTS},
            "peak_mebibytes": _over(point, peak_mebibytes),
        },
    }


def _over(point: Point, read: Callable[[RunRecord], float]) -> dict[str, object] | None:
    return _spread({seed: read(record) for seed, record in point.runs.items()})


def _level(task: TaskSummary, point: Point, sparsity: float) -> dict[str, object]:
    names = ("achieved", "achieved_total", "predicted_increase", "measured_increase", "reconstructed_increase")
    found = point.levels(sparsity)
    return {
        "sparsity": sparsity,
        **{phase: {n: _spread(point.metric(Metric(n), sparsity, phase)) for n in task.dense} for phase in task.phases},
        **{name: _spread({seed: getattr(level, name) for seed, (_, level) in found.items()}) for name in names},
        "multiply_adds_remaining": _spread(point.figures(sparsity, lambda _, level: task.remaining(level))),
    }


def _spread(values: dict[int, float]) -> dict[str, object] | None:
    spread = Spread.of(values)
    return None if spread is None else dict(vars(spread))


def _difference(metric: Metric, found: Difference | None) -> dict[str, object]:
    if found is None:
        return {"difference": None, "verdict": "unclaimed"}
    return {"difference": dict(vars(found)), "verdict": metric.verdict(found)}


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
