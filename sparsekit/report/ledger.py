"""Tables beside the results: cost, reached sparsity, losses, tuning, departures, and runs with problems."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from sparsekit.compare.plan import Tuning
from sparsekit.report.spread import Spread, percent, significant
from sparsekit.report.summary import Point, Summary, TaskSummary, asked
from sparsekit.report.tables import Cell, Table, named
from sparsekit.runs.curvature_cache import SHARED_SECONDS
from sparsekit.runs.schema import LevelRecord, RunRecord

#: Parts of a run that have a column of seconds.
PARTS = ("curvature", "removal", "reconstruction", "finetune", "total")


def shared_seconds(record: RunRecord) -> float:
    """Curvature seconds that another run spent for this one."""
    return sum(step.curvature.get(SHARED_SECONDS, 0.0) for step in record.steps)


def seconds(record: RunRecord, part: str) -> float:
    """Seconds of a part of the run; curvature and total include shared statistics as if they were computed here."""
    spent = record.seconds.get(part, 0.0)
    return spent + shared_seconds(record) if part in ("curvature", "total") else spent


def peak_mebibytes(record: RunRecord) -> float:
    """The largest measured resident or device memory, MiB."""
    return record.peak_memory_bytes / 2**20


def curvature_examples(record: RunRecord) -> tuple[int | None, int]:
    """(examples of one estimate, estimates); None: the estimator has no such setting."""
    if record.estimator == "identity":  # uses none
        return None, 0
    examples = record.settings["estimator"].get("examples")
    return examples, sum(step.refreshed for step in record.steps)


def cost(task: TaskSummary) -> Table:
    """Seconds of each part, peak memory and examples of each point, as means over seeds."""
    rows, shared = [], False
    for point in task.points:
        runs = point.runs
        cells = [_mean({seed: seconds(record, part) for seed, record in runs.items()}, significant) for part in PARTS]
        if any(shared_seconds(record) > 0 for record in runs.values()):
            shared, cells[0] = True, Cell(f"{cells[0].text} †", cells[0].details)
        memory = _mean({seed: peak_mebibytes(record) for seed, record in runs.items()}, lambda v: f"{v:,.0f}")
        rows.append((*named(task, point), *cells, memory, _examples(runs.values())))
    notes = ["Means over seeds, with the least and greatest; wall-clock time, all sparsities of a run together."]
    if shared:
        notes.append(
            "† These statistics were shared: another run of the comparison computed them. Its seconds are counted "
            "here, too, so that rows can be compared; the whole comparison took less than their sum."
        )
    return Table(
        title="Cost: seconds by part, peak memory, curvature examples",
        columns=(*task.shown, *(f"{part} s" for part in PARTS), "peak MiB", "examples × estimates"),
        rows=tuple(rows),
        heads=len(task.shown),
        notes=tuple(notes),
    )


def _mean(values: dict[int, float], text: Callable[[float], str]) -> Cell:
    spread = Spread.of(values)
    if spread is None:
        return Cell("–")
    return Cell(text(spread.mean), (f"{text(spread.low)}–{text(spread.high)}",) if spread.high > spread.low else ())


def _examples(records: Iterable[RunRecord]) -> Cell:
    found = dict.fromkeys(curvature_examples(record) for record in records)
    words = ["none" if n is None or times == 0 else f"{n:,} × {times}" for n, times in found]
    return Cell(", ".join(dict.fromkeys(words)) or "–")


def reached(task: TaskSummary) -> Table:
    """The requested and the reached sparsity, of prunable weights and of all parameters, over all runs."""
    rows = []
    for sparsity, text in zip(task.sparsities, asked(task.sparsities), strict=True):
        levels = [level for point in task.points for _, level in point.levels(sparsity).values()]
        rows.append(
            (
                Cell(text),
                Cell(_range(level.achieved for level in levels)),
                Cell(_range(level.achieved_total for level in levels)),
            )
        )
    return Table(
        title="Sparsity asked for and reached, over all runs",
        columns=("asked", "reached, prunable weights", "reached, all parameters"),
        rows=tuple(rows),
        notes=(f"{task.sizes[0]:,} prunable weights of {task.sizes[1]:,} parameters.",),
    )


def _range(fractions: Iterable[float]) -> str:
    values = [f"{100 * value:.2f}" for value in sorted(fractions)]
    if not values:
        return "–"
    return f"{values[0]} %" if values[0] == values[-1] else f"{values[0]}–{values[-1]} %"


def multiply_adds(task: TaskSummary) -> Table | None:
    """The remaining multiply-adds by point and sparsity; None where the plan has no counts."""
    total = sum(task.multiply_adds.values())
    if not total:
        return None

    def fraction(point: Point, sparsity: float) -> Cell:
        values = point.figures(sparsity, lambda _, level: task.remaining(level))
        return _mean(values, lambda value: f"{100 * value:.1f}")

    rows = [(*named(task, p), *(fraction(p, s) for s in task.sparsities)) for p in task.points]
    return Table(
        title="Remaining multiply-adds, theoretical, in % of the dense network's",
        columns=(*task.shown, *asked(task.sparsities)),
        rows=tuple(rows),
        heads=len(task.shown),
        notes=(
            f"Dense: {total / 1e6:,.3g} million for one example. Theoretical: what an ideal sparse kernel would be "
            "left with; no time was measured.",
        ),
        folded=True,
    )


def losses(task: TaskSummary) -> Table:
    """Predicted and measured increase, the change by reconstruction, and the gap on the examples of the results."""

    def gap(record: RunRecord, level: LevelRecord) -> float | None:
        if "loss" not in level.pruned or "loss" not in record.dense:
            return None
        return level.pruned["loss"] - record.dense["loss"]

    reads: tuple[Callable[[RunRecord, LevelRecord], float | None], ...] = (
        lambda _, level: level.predicted_increase,
        lambda _, level: level.measured_increase,
        lambda _, level: level.reconstructed_increase,
        gap,
    )
    rows = []
    for point in task.points:
        for sparsity, text in zip(task.sparsities, asked(task.sparsities), strict=True):
            cells = [_mean(point.figures(sparsity, read), significant) for read in reads]
            rows.append((*named(task, point), Cell(text), *cells))
    return Table(
        title="Increase of the mean loss per example",
        columns=(*task.shown, "sparsity", "predicted", "measured", "by reconstruction", "gap, data reported on"),
        rows=tuple(rows),
        heads=len(task.shown) + 1,
        notes=(
            "Predicted by the quadratic model and measured are of the same cuts, on the calibration (training) "
            "examples; what the reconstruction changed of the same loss stands beside them. The gap is the pruned "
            "minus the dense loss on the examples reported on. – : not defined.",
        ),
        folded=True,
    )


def trials(tuning: Tuning) -> Table:
    """All trials of tuning and the chosen ones."""
    rows = []
    for found in tuning.tuned:
        where = ", ".join(f"{axis} {value}" for axis, value in found.axes.items())
        for trial in found.trials:
            chosen = found.damping is not None and math.isclose(trial.damping, found.damping, rel_tol=1e-9)
            value = f"{trial.value:.4g}" if math.isfinite(trial.value) else f"failed: {trial.cause or 'no cause known'}"
            rows.append((Cell(where), Cell(f"{trial.damping:.3g}"), Cell(value), Cell("chosen" if chosen else "")))
        if found.damping is None:
            rows.append((Cell(where), Cell("–"), Cell("no trial succeeded"), Cell("untuned")))
    notes = [f"Maximised: {tuning.objective}. Damping in units of the mean of diag F."]
    if tuning.untuned:
        notes.append(f"No damping to tune: {', '.join(tuning.untuned)}.")
    return Table(
        title="Trials",
        columns=("where", "damping", "objective", ""),
        rows=tuple(rows),
        notes=tuple(notes),
        folded=len(rows) > 30,
    )


def departures(summary: Summary) -> Table:
    """Settings that differ from each method's defaults, or from its preset."""
    found: dict[tuple[str, str, str], dict[str, None]] = {}
    for state in summary.states:
        axes = state.run.axes
        for setting, value in state.run.departures.items():
            key = axes["task"], axes["method"], setting
            found.setdefault(key, {})[json.dumps(value, default=str)] = None
    rows = tuple((*map(Cell, key), Cell(", ".join(values))) for key, values in found.items())
    return Table("Departures from published or default settings", ("task", "method", "setting", "here"), rows, heads=2)


def mishaps(summary: Summary) -> Table:
    """Failed, unfinished and degraded runs, with causes."""
    rows = []
    for state in summary.states:
        where = ", ".join(f"{axis} {value}" for axis, value in state.run.axes.items())
        run = Cell(where, (Path(state.run.directory).name,)), Cell(str(state.run.seed))
        failure = summary.comparison.failures.get(state.run.directory)
        if state.state == "failed" and failure is not None:
            rows.append((*run, Cell("failed"), Cell(failure.cause, (failure.when,) if failure.when else ())))
        if state.state == "unfinished":
            reached = [percent(level.sparsity) for level in state.record.levels] if state.record else []
            begun = f"begun, levels reached: {', '.join(reached) or 'none'}" if state.record else "not begun"
            rows.append((*run, Cell("unfinished"), Cell(f"{begun}; in no table")))
        for line in state.record.degraded if state.record else ():
            rows.append((*run, Cell("degraded"), Cell(line)))
    return Table("Failed, unfinished and degraded runs", ("run", "seed", "state", "cause"), tuple(rows), heads=2)


def machines(summary: Summary) -> Table:
    """The machines and versions of the runs, each combination once."""
    records = [state.record for state in summary.states if state.record is not None]
    counts = Counter(tuple(record.machine.items()) for record in records)
    names = tuple(dict.fromkeys(name for key in counts for name, _ in key))
    rows = tuple((*(Cell(dict(key).get(name, "–")) for name in names), Cell(str(n))) for key, n in counts.items())
    plugins = sorted({f"{plugin['name']} {plugin['version']}" for record in records for plugin in record.plugins})
    notes = [f"Plugins: {', '.join(plugins)}."]
    if len(rows) > 1:
        notes.append("More than one kind: seconds of different kinds are not comparable.")
    return Table("Machines and versions", (*names, "runs"), rows, notes=tuple(notes))
