"""The figures of a task: accuracy, Pareto, predicted against measured, layers, refinement."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.axes import Axes

from sparsekit.report.drawing import MOST, Figure, Panel, Styles, draw, literal, sparsity_axis, styles
from sparsekit.report.ledger import seconds
from sparsekit.report.spread import Metric, Spread, percent
from sparsekit.report.summary import Phase, Point, TaskSummary, label
from sparsekit.report.tables import phase_name
from sparsekit.runs.schema import RunRecord, StepRecord


def of_task(task: TaskSummary, name: str) -> list[Figure]:
    """All figures for which the records have data; `name` is the prefix of their ids."""
    found: list[Figure | None] = []
    for phase in task.phases:
        found += [accuracy(task, phase, f"{name}-{phase}"), pareto(task, phase, f"{name}-pareto-{phase}")]
    found += [increases(task, f"{name}-increase"), layers(task, f"{name}-layers")]
    found.append(refinement(task, f"{name}-refinement"))
    return [figure for figure in found if figure is not None]


def panels(
    task: TaskSummary, points: Sequence[Point], body: Callable[[Sequence[Point], Axes, Styles], None]
) -> list[Panel]:
    """One panel for each value of the axes besides the method, so that a line is a method, in one style everywhere."""
    others = [axis for axis in task.shown if axis != "method"]
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(label(point.axes, others), []).append(point)
    out = []
    for title, same in groups.items():
        for start in range(0, len(same), MOST):
            few = same[start : start + MOST]
            more = f" ({start // MOST + 1})" if len(same) > MOST else ""
            out.append(Panel(title.replace(", ", ",\n") + more, partial(body, few), tuple(p.method for p in few)))
    return out


def _scaled(metric: Metric, value: float) -> float:
    return 100 * value if metric.is_accuracy else value


def _axis(metric: Metric) -> str:
    return "top-1 accuracy in %" if metric.is_accuracy else f"{metric.name}, mean per example"


def _dense(task: TaskSummary, axes: Axes) -> None:
    if task.metric.name in task.dense:
        level = _scaled(task.metric, task.dense[task.metric.name].mean)
        axes.axhline(level, color="#555555", linewidth=0.8, linestyle=(0, (1, 2)))


def _value_axis(task: TaskSummary, axes: Axes) -> None:
    axes.set_ylabel(literal(_axis(task.metric)))
    if not task.metric.is_accuracy:
        axes.set_yscale("log")  # the loss after a failed cut is many times the dense network's


def accuracy(task: TaskSummary, phase: Phase, name: str) -> Figure | None:
    """The metric against sparsity, with bands from the lowest to the highest seed."""

    def body(points: Sequence[Point], axes: Axes, known: Styles) -> None:
        for point in points:
            values = {s: Spread.of(point.metric(task.metric, s, phase)) for s in task.sparsities}
            rows = [(1 - s, v) for s, v in values.items() if v is not None and math.isfinite(v.mean)]
            places, spreads = [place for place, _ in rows], [spread for _, spread in rows]
            low, mean, high = (
                [_scaled(task.metric, getattr(spread, part)) for spread in spreads] for part in ("low", "mean", "high")
            )
            axes.plot(places, mean, **known[point.method].line())
            axes.fill_between(places, low, high, color=known[point.method].colour, alpha=0.15, linewidth=0)
        _dense(task, axes)
        _value_axis(task, axes)
        sparsity_axis(axes, task.sparsities)

    points = [p for p in task.points if any(p.metric(task.metric, s, phase) for s in task.sparsities)]
    if not points:
        return None
    caption = (
        f"{_axis(task.metric)} after {'the cut' if phase == 'pruned' else 'fine-tuning'} against sparsity: mean over "
        "seeds, bands from the least to the greatest. Dotted: the dense network."
    )
    title = f"{_title(task.metric)} against sparsity, {phase_name(phase)}"
    return draw(name, title, _capital(caption), panels(task, points, body), _styles(task))


def _title(metric: Metric) -> str:
    return "Accuracy" if metric.is_accuracy else _capital(metric.name)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def pareto(task: TaskSummary, phase: Phase, name: str) -> Figure | None:
    """The metric against curvature seconds at the middle sparsity."""
    spent, reached = {}, {}
    for point in task.points:
        cost = Spread.of({seed: seconds(record, "curvature") for seed, record in point.runs.items()})
        value = Spread.of(point.metric(task.metric, task.middle, phase))
        if cost is not None and value is not None and math.isfinite(value.mean):
            spent[point], reached[point] = cost.mean, value
    if not reached:
        return None
    least = min((cost for cost in spent.values() if cost > 0), default=1.0)

    def body(points: Sequence[Point], axes: Axes, known: Styles) -> None:
        for point in points:
            low, mean, high = (_scaled(task.metric, getattr(reached[point], part)) for part in ("low", "mean", "high"))
            axes.vlines(spent[point], low, high, color=known[point.method].colour, linewidth=1)
            axes.plot([spent[point]], [mean], **known[point.method].dots())
        axes.set_xscale("symlog", linthresh=10 ** math.floor(math.log10(least)))
        axes.set_xlim(-0.3 * 10 ** math.floor(math.log10(least)), 1.6 * max(least, *spent.values()))
        axes.set_xlabel("curvature in s (log scale, from 0)")
        _dense(task, axes)
        _value_axis(task, axes)

    where = percent(task.middle)
    caption = (
        f"{_axis(task.metric)} at {where} against the seconds that all curvature of a run took: mean over seeds, bars "
        "from the least to the greatest. Dotted: the dense network. Further left is cheaper."
    )
    title = f"{_title(task.metric)} at {where} against curvature seconds, {phase_name(phase)}"
    return draw(name, title, _capital(caption), panels(task, list(reached), body), _styles(task))


def increases(task: TaskSummary, name: str) -> Figure | None:
    """Predicted against measured increase of the loss, both logarithmic, with the diagonal."""
    pairs = {
        point: [
            (level.predicted_increase, level.measured_increase)
            for sparsity in task.sparsities
            for _, level in point.levels(sparsity).values()
        ]
        for point in task.points
    }
    good = {point: [pair for pair in found if _positive(pair)] for point, found in pairs.items()}
    good = {point: found for point, found in good.items() if found}
    if not good:
        return None
    left = sum(map(len, pairs.values())) - sum(map(len, good.values()))
    everything = [value for found in good.values() for pair in found for value in pair]
    ends = [min(everything), max(everything)]

    def body(points: Sequence[Point], axes: Axes, known: Styles) -> None:
        axes.plot(ends, ends, color="#555555", linewidth=0.8)
        for point in points:
            predicted, measured = zip(*good[point], strict=True)
            axes.plot(predicted, measured, **known[point.method].dots())
        axes.set(xscale="log", yscale="log", xlabel="predicted increase of the loss", ylabel="measured increase")

    caption = (
        "Increase of the mean loss per example on the calibration examples, predicted by the quadratic model and "
        "measured, one mark for each seed and sparsity; on the line the prediction is exact."
    )
    if left:
        caption += f" Left out, because one of the two is not positive or not defined: {left}."
    return draw(name, "Predicted against measured increase", caption, panels(task, list(good), body), _styles(task))


def _styles(task: TaskSummary) -> Styles:
    """The style of each method, the same in all figures of its task."""
    return styles([point.method for point in task.points])


def _positive(pair: tuple[float, float]) -> bool:
    return all(math.isfinite(value) and value > 0 for value in pair)


def layers(task: TaskSummary, name: str) -> Figure | None:
    """The sparsity of each layer at the middle sparsity, for the first seed of the first point of each method."""
    chosen: dict[tuple[str, ...], tuple[Point, dict[str, float]]] = {}
    for point in task.points:
        levels = point.levels(task.middle)
        key = tuple(point.axes.get(axis, "") for axis in ("method", "pattern", "schedule"))
        if levels and key not in chosen:
            chosen[key] = point, levels[min(levels)][1].layer_sparsity
    groups: dict[str, dict[str, dict[str, float]]] = {}  # title -> method -> layer -> sparsity
    shown = [axis for axis in ("pattern", "schedule") if axis in task.shown]
    for point, sparsity in chosen.values():
        groups.setdefault(label(point.axes, shown), {})[point.method] = sparsity
    names = list(dict.fromkeys(n for drawn in groups.values() for found in drawn.values() for n in found))
    if not names:
        return None

    def body(drawn: dict[str, dict[str, float]], methods: Sequence[str], axes: Axes, known: Styles) -> None:
        for method in methods:
            axes.plot([100 * drawn[method].get(n, 0.0) for n in names], **known[method].line())
        axes.set_xticks(range(len(names)), [literal(n) for n in names], rotation=90, fontsize=7)
        axes.set(ylabel="sparsity of the layer in %", xlabel="weight, in the network's order")

    found = []
    for title, drawn in groups.items():
        methods = list(drawn)
        for start in range(0, len(methods), MOST):
            few = tuple(methods[start : start + MOST])
            found.append(Panel(title, partial(body, drawn, few), few))
    where = percent(task.middle)
    caption = f"Where the weights went at {where} over all: the first row of each method in the plan, its first seed."
    return draw(name, f"Layer-wise sparsity at {where}", caption, found, _styles(task), columns=1, tall=3.6)


def refinement(task: TaskSummary, name: str) -> Figure | None:
    """The metric along the steps of gradual runs, before and after each step's fine-tuning."""
    runs = {point: point.runs[min(point.runs)] for point in task.points if point.runs}
    tracks = {point: track for point, run in runs.items() if len(track := _track(task.metric, run)) > 1}
    if not tracks:
        return None

    def body(points: Sequence[Point], axes: Axes, known: Styles) -> None:
        for point in points:
            steps, values = zip(*tracks[point], strict=True)
            axes.plot(steps, [_scaled(task.metric, v) for v in values], **known[point.method].line())
        axes.set_xlabel("step (cut, then fine-tuning at half)")
        _dense(task, axes)
        _value_axis(task, axes)

    caption = (
        f"{_axis(task.metric)} along the steps of gradual runs, first seed: at a whole number after the cut and "
        "reconstruction, half a step on after fine-tuning. Dotted: the dense network."
    )
    return draw(name, "Refinement, step by step", _capital(caption), panels(task, list(tracks), body), _styles(task))


def _track(metric: Metric, run: RunRecord) -> list[tuple[float, float]]:
    """(step, metric): at n after the n-th cut, at n + ½ after its fine-tuning; empty unless cuts form one path."""
    if run.path != "sequential" or len(run.steps) < 2:
        return []
    return [point for step in run.steps for point in _of_step(metric, step)]


def _of_step(metric: Metric, step: StepRecord) -> list[tuple[float, float]]:
    found = [(step.index + 1.0, step.pruned), (step.index + 1.5, step.finetuned)]
    known = [
        (place, figures[metric.name]) for place, figures in found if figures is not None and metric.name in figures
    ]
    return [(place, value) for place, value in known if math.isfinite(value)]
