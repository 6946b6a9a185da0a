"""Sentences on the results, with their numbers; a tie is called a tie, and too few seeds support no claim."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sparsekit.compare.plan import Tuning
from sparsekit.report.attribution import ARMS, counterpart, difference, parts, tied
from sparsekit.report.spread import FEWEST, Difference, Metric, Spread, Verdict, percent
from sparsekit.report.summary import Phase, Point, Summary, TaskSummary
from sparsekit.report.tables import phase_name

#: A sparsity and the difference there.
Found = tuple[float, Difference | None]


def said(metric: Metric, found: Difference) -> str:
    """'+1.2, +0.1 to +2.3': the mean and the 95 % interval; '+1.2, n 2' without an interval."""
    if found.interval is None:
        return f"{metric.change(found.mean)}, n {found.n}"
    low, high = (metric.change(value) for value in found.interval)
    return f"{metric.change(found.mean)}, {low} to {high}"


def by_verdict(metric: Metric, found: Iterable[Found], words: dict[Verdict, str]) -> str:
    """'more at 80 % (…), 90 % (…); a tie at 50 % (…)': sparsities grouped by verdict."""
    groups: dict[Verdict, list[str]] = {}
    for sparsity, value in found:
        if value is not None:
            groups.setdefault(metric.verdict(value), []).append(f"{percent(sparsity)} ({said(metric, value)})")
    return "; ".join(f"{text} at {', '.join(groups[key])}" for key, text in words.items() if key in groups)


def of_task(task: TaskSummary, method: str | None) -> list[str]:
    """Sentences on a task's tables, the most important first."""
    most = max((len(point.runs) for point in task.points), default=0)
    out = []
    if most < FEWEST:
        seeds = "one seed" if most == 1 else f"{most} seeds"
        out.append(
            f"With {seeds} no difference is claimed, whatever the means are: {FEWEST} are needed for an interval."
        )
    for phase in task.phases:
        out += _best(task, phase)
        if method is not None:
            out += _second_order(task, method, phase)
        out += [_tally(task.metric, contests) for contests in _contests(task, phase)]
    return out + _missing(task, method)


def by_method(task: TaskSummary) -> list[str]:
    """The sentences behind the counts of `of_task`, with each method's numbers."""
    out = []
    for phase in task.phases:
        for contest in (contest for contests in _contests(task, phase) for contest in contests):
            text = by_verdict(task.metric, contest.found, contest.words)
            out.append(f"{contest.method}: {contest.what}, {text}.")
    return out


@dataclass(frozen=True)
class Contest:
    """One arm against another, within one method.

    Attributes:
        what: the two arms, in the same words for all methods.
        method: the method's name.
        words: for each verdict.
        found: the difference at each sparsity.
    """

    what: str
    method: str
    words: dict[Verdict, str]
    found: list[Found]


def _tally(metric: Metric, contests: Sequence[Contest]) -> str:
    """'…, in 3 methods. 50 %: a tie in 3 (0.0); 90 %: more in 2 (+2.0 to +6.5), a tie in 1 (0.0).'."""
    groups: dict[float, dict[Verdict, list[float]]] = {}
    for sparsity, value in (found for contest in contests for found in contest.found):
        if value is not None:
            groups.setdefault(sparsity, {}).setdefault(metric.verdict(value), []).append(value.mean)
    words = []
    for sparsity, verdicts in groups.items():
        counts = [_count(metric, text, verdicts[key]) for key, text in contests[0].words.items() if key in verdicts]
        words.append(f"{percent(sparsity)}: {', '.join(counts)}")
    n = len(contests)
    return f"{_capital(contests[0].what)}, in {n} method{'s' * (n != 1)}. {'; '.join(words)}."


def _count(metric: Metric, text: str, means: list[float]) -> str:
    low, high = metric.change(min(means)), metric.change(max(means))
    return f"{text} in {len(means)} ({low if low == high else f'{low} to {high}'})"


def _best(task: TaskSummary, phase: Phase) -> list[str]:
    words = []
    for sparsity in task.sparsities:
        best, near = tied(task, sparsity, phase)
        spread = Spread.of(best.metric(task.metric, sparsity, phase)) if best is not None else None
        if best is None or spread is None:
            continue
        what = f"{percent(sparsity)}: {best.label}, {task.metric.text(spread.mean)}{' %' * task.metric.is_accuracy}"
        if near:
            what += f" (tied with {near[0].label})" if len(near) == 1 else f" (tied with {len(near)} others)"
        words.append(what)
    return [f"Best mean, {phase_name(phase)}. {'. '.join(words)}."] if words else []


def _contests(task: TaskSummary, phase: Phase) -> list[list[Contest]]:
    """Contests grouped by their two arms, without those that have no finished runs."""
    groups: dict[str, list[Contest]] = {}
    for contest in (*_reconstruction_or_compensation(task, phase), *_once_reconstructed(task, phase)):
        if any(value is not None for _, value in contest.found):
            groups.setdefault(contest.what, []).append(contest)
    return list(groups.values())


def _reconstruction_or_compensation(task: TaskSummary, phase: Phase) -> Iterator[Contest]:
    """For each method, the point with reconstruction only against the one with compensation only."""
    words: dict[Verdict, str] = {"better": "more", "tie": "a tie", "worse": "less", "unclaimed": "no claim"}
    for rebuilt in _alone(task, "reconstruction"):
        for moved in _alone(task, "compensation"):
            if _others(rebuilt) == _others(moved):
                what = f"{rebuilt.axes['reconstruction']} reconstruction alone contributes, against "
                what += f"{moved.axes['compensation']} compensation alone, {phase_name(phase)}"
                yield Contest(what, rebuilt.method, words, _along(task, rebuilt, moved, phase))


def _alone(task: TaskSummary, arm: str) -> list[Point]:
    """Points that have this arm and not the other one."""
    other = ARMS[1 - ARMS.index(arm)]
    return [p for p in task.points if p.axes.get(arm, "none") != "none" and p.axes.get(other) == "none"]


def _others(point: Point) -> dict[str, str]:
    return {axis: value for axis, value in point.axes.items() if axis not in ARMS}


def _once_reconstructed(task: TaskSummary, phase: Phase) -> Iterator[Contest]:
    """For each method, what compensation adds to a reconstruction."""
    words: dict[Verdict, str] = {
        "better": "still adds",
        "tie": "adds nothing (a tie)",
        "worse": "takes away",
        "unclaimed": "no claim",
    }
    for part in parts(task, None):
        if part.kind != "compensation" or part.point is None or part.point.axes.get("reconstruction") == "none":
            continue
        how, fitted = part.point.axes["compensation"], part.point.axes.get("reconstruction", "none")
        what = f"with {fitted} reconstruction in place {how} compensation, {phase_name(phase)}"
        yield Contest(what, part.method, words, _along(task, part.point, part.base, phase))


def _along(task: TaskSummary, point: Point, base: Point | None, phase: Phase) -> list[Found]:
    return [(s, difference(point, base, task.metric, s, phase) if base else None) for s in task.sparsities]


def _second_order(task: TaskSummary, method: str, phase: Phase) -> list[str]:
    """The best second-order point with a reconstruction against the reference with the same."""
    words: dict[Verdict, str] = {
        "better": "gains",
        "tie": "adds nothing (a tie)",
        "worse": "loses",
        "unclaimed": "is not claimed to differ",
    }
    if any(p.is_second_order for p in task.points if p.method == method):
        return []  # the reference is second-order, too
    out = []
    for fitted in dict.fromkeys(p.axes.get("reconstruction", "none") for p in task.points):
        found, names = [], dict[str, None]()
        for sparsity in task.sparsities:
            ranked = task.ranked(sparsity, phase)
            same = [p for p in ranked if p.axes.get("reconstruction", "none") == fitted]
            best = next((p for p in same if p.is_second_order and p.method != method), None)
            base = counterpart(best, [p for p in same if p.method == method]) if best is not None else None
            if best is not None and base is not None:
                found.append((sparsity, difference(best, base, task.metric, sparsity, phase)))
                names[best.short] = None
        text = by_verdict(task.metric, found, words)
        if text:
            where = f"with {fitted} reconstruction" if fitted != "none" else "without reconstruction"
            which = f"the best row at each sparsity ({'; '.join(names)}; chosen by the same figures) against {method}"
            out.append(f"Second-order information {where}, {phase_name(phase)}, {which}: {text}.")
    return out


def _missing(task: TaskSummary, method: str | None) -> list[str]:
    missing = [part for part in parts(task, method) if part.missing not in ("", "no run with compensation")]
    lines = [f"{part.method}: {part.missing}" for part in missing]
    return [f"Parts that cannot be told for want of an arm: {'; '.join(dict.fromkeys(lines))}."] if lines else []


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def warnings(summary: Summary) -> list[str]:
    """Departures from the protocol, those of the plan and those that the records show."""
    out = list(summary.comparison.plan.warnings)
    for task in summary.tasks:
        if task.mixed:
            seeds = ", ".join(map(str, task.mixed))
            out.append(f"{task.name}: not all methods started from the same dense weights (seeds {seeds}).")
        if task.splits != ("reporting",):
            out.append(
                f"{task.name}: metrics are of the examples '{', '.join(task.splits)}', not of the reporting half."
            )
    for name in summary.empty:
        out.append(f"{name}: no run has finished; there are no figures of it.")
    return out


def limits(summary: Summary) -> list[str]:
    """Sentences on what cannot be concluded."""
    plan = summary.comparison.plan
    out = [f"A seed varies: {'; '.join(plan.seeds_vary)}."] if plan.seeds_vary else []
    out += [f"Seeds share: {'; '.join(plan.seeds_share)}."] if plan.seeds_share else []
    for task in summary.tasks:
        if task.is_small:
            out.append(
                f"{task.name} is a small task ({task.sizes[0]:,} prunable weights): neither the order of the methods, "
                "nor the sparsities at which they break down, nor their relative cost can be concluded from it for "
                "larger networks or harder data."
            )
    return out


def tuning(found: Tuning | None) -> str:
    """How settings were tuned, in sentences."""
    if found is None:
        return "Nothing was tuned: every row is at its method's own defaults, or as published where it says so."
    count = {len(entry.trials) for entry in found.tuned}
    each = f"{min(count)}" if len(count) == 1 else f"{min(count, default=0)} to {max(count, default=0)}"
    failed = sum(not math.isfinite(trial.value) for entry in found.tuned for trial in entry.trials)
    lost = f", of which {failed} failed" if failed else ""
    places = f"Damping was tuned at {len(found.tuned)} places of the axes, {each} trials each{lost}"
    edge = sum(
        entry.damping in (min(t.damping for t in entry.trials), max(t.damping for t in entry.trials))
        for entry in found.tuned
        if entry.damping is not None
    )
    edges = f" At {edge} of them the best damping is at the edge of what was tried." if edge else ""
    return (
        f"{places}; maximised: {found.objective}. Other axes than {', '.join(found.tuned[0].axes)} take over what was "
        f"found at their first value, and what a compensation gives contains that of its own damping.{edges}"
        if found.tuned
        else f"{places}."
    )


def dense(task: TaskSummary) -> str:
    """The dense network's metrics, as a sentence."""
    figures: Sequence[str] = [
        f"{name} {Metric(name).text(spread.mean)}{' %' if Metric(name).is_accuracy else ''}"
        + (f" ({Metric(name).text(spread.low)}–{Metric(name).text(spread.high)})" if spread.high > spread.low else "")
        for name, spread in task.dense.items()
    ]
    weights = f"{len(task.hashes)} network{'s' * (len(task.hashes) != 1)}"
    hashes = ", ".join(digest[:12] for digest in task.hashes)
    return f"Dense: {', '.join(figures)}; {weights} (weights {hashes})." if hashes else f"Dense: {', '.join(figures)}."
