"""Tables of results: metrics by point and sparsity, paired differences, parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsekit.report.attribution import difference, parts, references, tied
from sparsekit.report.spread import FEWEST, Difference, Metric, Spread
from sparsekit.report.summary import Phase, Point, TaskSummary, asked

#: The note under every table of paired differences.
PAIRED = (
    f"Differences are taken seed by seed: mean, 95 % t interval (from {FEWEST} pairs on), least and greatest. A tie is "
    "an interval that covers zero. Each interval stands by itself: it is not corrected for the number of comparisons, "
    "and it speaks of what the seeds vary only."
)


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: a number or words.
        details: shown small below it or beside it.
        mark: 'best', 'tied' or ''.
    """

    text: str
    details: tuple[str, ...] = ()
    mark: str = ""

    @property
    def sign(self) -> str:
        """The symbol of the mark, which does not depend on colours."""
        return {"best": " ★", "tied": " ≈"}.get(self.mark, "")


@dataclass(frozen=True)
class Table:
    """A table for both templates.

    Attributes:
        title: with the unit.
        columns: their headings.
        rows: each with one cell for each column.
        heads: number of leading columns that identify a row.
        notes: sentences below it.
        folded: whether it is collapsed at first.
        stacked: whether details are shown below the numbers, not beside them.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    heads: int = 1
    notes: tuple[str, ...] = ()
    folded: bool = False
    stacked: bool = False


def named(task: TaskSummary, point: Point) -> tuple[Cell, ...]:
    """The cells that identify a row's point; details of the first are missing tuning and seeds."""
    lacks = [point.tuning] if point.tuning not in ("", "tuned") else []
    if len(point.runs) < len(point.planned):
        lacks.append(f"{len(point.runs)} of {len(point.planned)} seeds")
    first, *others = (point.axes.get(axis, "–") for axis in task.shown)
    return Cell(first, tuple(lacks)), *(Cell(value) for value in others)


def place(task: TaskSummary, point: Point) -> str:
    """The point's values on the shown axes, in short."""
    return ", ".join(point.axes.get(axis, "–") for axis in task.shown)


def phase_name(phase: Phase) -> str:
    """The phase in words."""
    return "pruned" if phase == "pruned" else "fine-tuned"


def figures(task: TaskSummary, phase: Phase) -> Table:
    """The task's metric by point and sparsity, with its spread; the first row is the dense network."""
    marks = {sparsity: tied(task, sparsity, phase) for sparsity in task.sparsities}
    dense = task.dense.get(task.metric.name)
    top = _spread(task.metric, dense, dense.n) if dense and dense.high > dense.low else Cell(_only(task.metric, dense))
    blank = [Cell("dense"), *(Cell("") for _ in task.shown[1:])]
    rows = [(*blank, Cell(str(dense.n) if dense else "–"), *(top for _ in task.sparsities))]
    for point in task.points:
        n, cells = len(point.runs), []
        for sparsity, (best, near) in marks.items():
            mark = "best" if point is best else "tied" if point in near else ""
            cells.append(_spread(task.metric, Spread.of(point.metric(task.metric, sparsity, phase)), n, mark))
        rows.append((*named(task, point), Cell(str(n)), *cells))
    return Table(
        title=f"{task.metric.title[0].upper()}{task.metric.title[1:]}, {phase_name(phase)}",
        columns=(*task.shown, "seeds", *asked(task.sparsities)),
        rows=tuple(rows),
        heads=len(task.shown) + 1,
        notes=_notes(task, phase),
    )


def _only(metric: Metric, spread: Spread | None) -> str:
    return "–" if spread is None else metric.text(spread.mean)


def _notes(task: TaskSummary, phase: Phase) -> tuple[str, ...]:
    most = max(len(point.runs) for point in task.points)
    notes = ["Mean over seeds, with the least and greatest. ★ is the best mean of its column, ≈ is tied with it."]
    if most < FEWEST:
        notes.append(f"Ties cannot be told from fewer than {FEWEST} seeds: none are marked.")
    if phase == "finetuned":
        notes.append("After fine-tuning; the column reconstruction says what was fitted before it.")
    elif "finetuned" in task.phases:
        notes.append("After the cut and reconstruction, before the fine-tuning at this sparsity.")
    else:
        notes.append("No fine-tuning; the column reconstruction says whether layers were fitted after the cut.")
    if any(len(point.runs) < len(point.planned) for point in task.points):
        notes.append("A row that lacks seeds says so; it is not ranked with those that have more.")
    if any(point.tuning == "untuned" for point in task.points):
        notes.append("Untuned: each method's own defaults.")
    return tuple(notes)


def _spread(metric: Metric, spread: Spread | None, n: int, mark: str = "") -> Cell:
    if spread is None:
        return Cell("–")
    least, greatest = metric.text(spread.low), metric.text(spread.high)
    words = [f"{least}–{greatest}"] if spread.n > 1 else []
    words += [f"n {spread.n}"] if spread.n != n else []
    return Cell(metric.text(spread.mean), tuple(words), mark)


def compared(metric: Metric, found: Difference | None) -> Cell:
    """A paired difference."""
    if found is None:
        return Cell("–")
    verdict = metric.verdict(found)
    text = metric.change(found.mean) + ("" if verdict == "unclaimed" else f" {verdict}")
    words = []
    if found.interval is not None:
        words.append(f"95 % {metric.change(found.interval[0])} to {metric.change(found.interval[1])}")
    span = f"{metric.change(found.low)} to {metric.change(found.high)}, " if found.n > 1 else ""
    return Cell(text, (*words, f"{span}n {found.n}"))


def against_reference(task: TaskSummary, method: str, phase: Phase) -> Table:
    """Each point minus the reference's, seed by seed."""
    rows = []
    for point, other in references(task, method).items():
        cells = (compared(task.metric, difference(point, other, task.metric, s, phase)) for s in task.sparsities)
        rows.append((*named(task, point), Cell(place(task, other).removeprefix(f"{method}, ")), *cells))
    return Table(
        title=f"Against {method}, {phase_name(phase)}: difference in {_unit(task.metric)}",
        columns=(*task.shown, f"minus {method}", *asked(task.sparsities)),
        rows=tuple(rows),
        heads=len(task.shown) + 1,
        notes=(PAIRED,),
        stacked=True,
    )


def best_two(task: TaskSummary, phase: Phase) -> Table:
    """At each sparsity the best point minus the second best."""
    rows = []
    for sparsity, text in zip(task.sparsities, asked(task.sparsities), strict=True):
        best, second = (*task.ranked(sparsity, phase)[:2], None, None)[:2]
        if best is None or second is None:
            continue
        found = difference(best, second, task.metric, sparsity, phase)
        mean, other = (Spread.of(point.metric(task.metric, sparsity, phase)) for point in (best, second))
        cells = [Cell(task.metric.text(spread.mean) if spread else "–") for spread in (mean, other)]
        names = [Cell(place(task, point)) for point in (best, second)]
        rows.append((Cell(text), *names, *cells, compared(task.metric, found)))
    return Table(
        title=f"Best and runner-up, {phase_name(phase)}: {_unit(task.metric)}",
        columns=("sparsity", "best", "runner-up", "best mean", "runner-up mean", "difference"),
        rows=tuple(rows),
        heads=3,
        notes=("The best was chosen by the same figures, which flatters its lead.",),
    )


def attribution(task: TaskSummary, method: str | None, phase: Phase) -> Table:
    """The parts of mask, compensation and reconstruction, by method."""
    rows = []
    for part in sorted(parts(task, method), key=lambda part: list(_methods(task)).index(part.method)):
        if part.missing:
            where = f"{part.where}: {part.missing}" if part.where else part.missing
            rows.append((Cell(part.method), Cell(part.kind), Cell(where), *(Cell("–") for _ in task.sparsities)))
            continue
        cells = (compared(task.metric, part.difference(task.metric, s, phase)) for s in task.sparsities)
        tuning = part.point.tuning if part.point is not None else ""
        lacks = (tuning,) if tuning not in ("", "tuned") else ()
        rows.append((Cell(part.method, lacks), Cell(part.kind), Cell(part.where), *cells))
    notes = [
        "The mask's part is the method without compensation and reconstruction minus the reference without them; the "
        "other parts are the point with it minus the same point without. A missing arm is named, not guessed.",
    ]
    if any(record.path == "sequential" for point in task.points for record in point.runs.values()):
        notes.append(
            "Some runs cut several times on one path: there a later mask depends on what compensation and "
            "reconstruction did before, so that the parts are differences between arms and not of one mask."
        )
    return Table(
        title=f"What the mask, compensation and reconstruction give, {phase_name(phase)}: {_unit(task.metric)}",
        columns=("method", "part", "where", *asked(task.sparsities)),
        rows=tuple(rows),
        heads=3,
        notes=(*notes, PAIRED),
        stacked=True,
    )


def _methods(task: TaskSummary) -> dict[str, None]:
    return dict.fromkeys(point.method for point in task.points)


def _unit(metric: Metric) -> str:
    return "points of top-1 accuracy" if metric.is_accuracy else f"{metric.name}, lower is better"


def of_task(task: TaskSummary, method: str | None) -> Sequence[Table]:
    """All tables of a task's results, in the order of the page."""
    out = [figures(task, phase) for phase in task.phases]
    for phase in task.phases:
        if method is not None and references(task, method):
            out.append(against_reference(task, method, phase))
        out += [best_two(task, phase), attribution(task, method, phase)]
    return [table for table in out if table.rows]
