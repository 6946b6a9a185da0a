"""What a reader should take away: one table, a row a method, and three sentences."""

from __future__ import annotations

from dataclasses import dataclass

from sparsekit.report.attribution import difference, is_tied
from sparsekit.report.ledger import seconds
from sparsekit.report.spread import Spread, percent
from sparsekit.report.summary import Phase, Point, TaskSummary, asked, label
from sparsekit.report.tables import Cell, Table, phase_name
from sparsekit.report.words import said


@dataclass(frozen=True)
class Headline:
    """The first screen of a task's report.

    Attributes:
        table: of the best row of each method at each sparsity.
        says: what won, by how much, at what price.
    """

    table: Table
    says: list[str]


def headline(task: TaskSummary, reference: str | None) -> Headline | None:
    """The first screen; None where no run has a finite figure. It is of the last phase: fine-tuned, if anything was."""
    phase = task.phases[-1]
    best = {s: _best_rows(task, s, phase) for s in task.sparsities}
    if not any(best.values()):
        return None
    winners = {s: _winners(task, rows, s, phase) for s, rows in best.items()}
    says = [*_won(winners), *_lead(task, best, reference, phase), *_price(task, best, reference)]
    return Headline(_table(task, best, winners, phase), says)


Rows = dict[str, Point]


def _best_rows(task: TaskSummary, sparsity: float, phase: Phase) -> Rows:
    """Method -> the best of its rows, the best method first."""
    rows: Rows = {}
    for point in task.ranked(sparsity, phase):
        rows.setdefault(point.method, point)
    return rows


def _winners(task: TaskSummary, rows: Rows, sparsity: float, phase: Phase) -> list[str]:
    """The best method, and those that are tied with it."""
    if not rows:
        return []
    first, *others = rows.values()
    near = [point.method for point in others if is_tied(task.metric, point, first, sparsity, phase)]
    return [first.method, *near]


def _table(task: TaskSummary, best: dict[float, Rows], winners: dict[float, list[str]], phase: Phase) -> Table:
    varies = {method: _varying(task, method) for method in dict.fromkeys(point.method for point in task.points)}
    rows = []
    if task.metric.name in task.dense:
        rows.append((Cell("dense"), *(Cell(task.metric.text(task.dense[task.metric.name].mean)) for _ in best)))
    for method, axes in varies.items():
        cells = [Cell(method)]
        for sparsity, found in best.items():
            spread = Spread.of(found[method].metric(task.metric, sparsity, phase)) if method in found else None
            if spread is None:
                cells.append(Cell("–"))
                continue
            won = winners[sparsity]
            mark = "" if method not in won else ("best" if method == won[0] else "tied")
            row = (label(found[method].axes, axes),) if axes else ()
            cells.append(Cell(task.metric.text(spread.mean), row, mark))
        rows.append(tuple(cells))
    notes = [
        "★ is the best mean of its column, ≈ is tied with it: the interval of their paired difference covers zero."
    ]
    if any(varies.values()):
        notes.append(
            "Of a method with several rows the best at each sparsity is shown, which the same figures chose: a method "
            "with more rows has more chances. All rows stand below."
        )
    measure = "Top-1 accuracy in %" if task.metric.is_accuracy else f"{task.metric.name}, lower is better"
    return Table(
        title=f"{measure}, {phase_name(phase)}",
        columns=("method", *asked(task.sparsities)),
        rows=tuple(rows),
        notes=tuple(notes),
        stacked=True,
    )


def _varying(task: TaskSummary, method: str) -> list[str]:
    """The axes in which a method's rows differ."""
    rows = [point.axes for point in task.points if point.method == method]
    return [axis for axis in task.shown if len({axes.get(axis) for axes in rows}) > 1]


def _won(winners: dict[float, list[str]]) -> list[str]:
    counts: dict[str, int] = {}
    for names in winners.values():
        for name in names:
            counts[name] = counts.get(name, 0) + 1
    ranked = sorted(counts, key=lambda name: -counts[name])
    words = [f"{name} at {counts[name]}" for name in ranked[:4]]
    rest = f", {len(ranked) - 4} others at fewer or as many" if len(ranked) > 4 else ""
    total = len([names for names in winners.values() if names])
    return [f"Best, or tied with the best, of {total} sparsities: {', '.join(words)}{rest}."]


def _lead(task: TaskSummary, best: dict[float, Rows], reference: str | None, phase: Phase) -> list[str]:
    """The best method against the reference, each at its best row, at the middle and the highest sparsity."""
    words = []
    for sparsity in dict.fromkeys((task.middle, max(task.sparsities))):
        rows = best[sparsity]
        other = next((m for m in rows if m != reference), None)
        if reference not in rows or other is None:
            continue
        found = difference(rows[other], rows[reference], task.metric, sparsity, phase)
        if found is not None:
            tie = ": a tie" if task.metric.verdict(found) == "tie" else ""
            words.append(f"at {percent(sparsity)} {other} by {said(task.metric, found)}{tie}")
    if not words:
        return []
    points = ", in points" if task.metric.is_accuracy else ""
    return [f"Ahead of {reference}, each at its best row{points}: {'; '.join(words)}."]


def _price(task: TaskSummary, best: dict[float, Rows], reference: str | None) -> list[str]:
    """Seconds of the rows that are compared at the middle sparsity."""
    rows = best[task.middle]
    first = next(iter(rows), None)
    words = []
    for method in dict.fromkeys(m for m in (first, reference) if m in rows):
        runs = rows[method].runs
        spent = {
            part: Spread.of({seed: seconds(run, part) for seed, run in runs.items()}) for part in ("total", "curvature")
        }
        total, curvature = spent["total"], spent["curvature"]
        if total is not None and curvature is not None:
            words.append(f"{method} {total.mean:,.0f} s a run of all levels, {curvature.mean:,.0f} of them curvature")
    return [f"The price of these at {percent(task.middle)}: {'; '.join(words)}."] if words else []
