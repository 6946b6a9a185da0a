"""Paired differences: each point against the reference, and the parts of mask, compensation and reconstruction.

The mask's part is a point without compensation and reconstruction minus the reference's such point. The part of a
compensation or a reconstruction is the point with it minus the same point without it. All differences are taken seed by
seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sparsekit.report.spread import Difference, Metric, Spread
from sparsekit.report.summary import Phase, Point, TaskSummary, label

#: The axes that have a part of the difference.
ARMS = ("compensation", "reconstruction")


@dataclass(frozen=True, eq=False)
class Part:
    """The part of mask, compensation or reconstruction in a method's difference.

    Attributes:
        kind: which of the three.
        method: the method's name.
        where: the values of the other axes, in words.
        point, base: with it and without it; None where the comparison has no such point.
        missing: why there is no difference; '' where there is one.
    """

    kind: Literal["mask", "compensation", "reconstruction"]
    method: str
    where: str
    point: Point | None
    base: Point | None
    missing: str = ""

    def difference(self, metric: Metric, sparsity: float, phase: Phase) -> Difference | None:
        """The metric with minus without; None where one of the two points is missing."""
        if self.point is None or self.base is None:
            return None
        return difference(self.point, self.base, metric, sparsity, phase)


def difference(point: Point, other: Point, metric: Metric, sparsity: float, phase: Phase) -> Difference | None:
    """The first point's metric minus the second's, seed by seed; None where no seed is in both."""
    return Difference.of(point.metric(metric, sparsity, phase), other.metric(metric, sparsity, phase))


def counterpart(point: Point, candidates: Sequence[Point]) -> Point | None:
    """The candidate that shares most axes with the point; ties go to the same reconstruction, then to the first."""

    def nearness(candidate: Point) -> tuple[int, bool]:
        same = {axis for axis, value in point.axes.items() if axis != "method" and candidate.axes.get(axis) == value}
        return len(same), "reconstruction" in same

    return max(candidates, key=nearness, default=None)


def references(task: TaskSummary, method: str | None) -> dict[Point, Point]:
    """Each point of another method -> the reference method's point that it is compared with."""
    theirs = [point for point in task.points if point.method == method]
    pairs = {point: counterpart(point, theirs) for point in task.points if point.method != method}
    return {point: other for point, other in pairs.items() if other is not None}


def tied(task: TaskSummary, sparsity: float, phase: Phase) -> tuple[Point | None, list[Point]]:
    """The best point, and the points whose difference to it is a tie (or exactly zero on average)."""
    ranked = task.ranked(sparsity, phase)
    if not ranked:
        return None, []
    return ranked[0], [point for point in ranked[1:] if is_tied(task.metric, point, ranked[0], sparsity, phase)]


def is_tied(metric: Metric, point: Point, best: Point, sparsity: float, phase: Phase) -> bool:
    """Whether the interval of their difference covers zero, or their means are the same."""
    found = difference(point, best, metric, sparsity, phase)
    if found is not None and metric.verdict(found) == "tie":
        return True
    means = [Spread.of(each.metric(metric, sparsity, phase)) for each in (point, best)]
    return means[0] is not None and means[1] is not None and means[0].mean == means[1].mean


def parts(task: TaskSummary, method: str | None) -> list[Part]:
    """All parts, also those for which the plan has no run; `method` is the reference."""
    bare = [p for p in task.points if p.method == method and all(p.axes.get(axis) == "none" for axis in ARMS)]
    found: list[Part] = []
    for (name, rest), arms in _groups(task).items():
        place = label(dict(rest), [axis for axis in task.shown if axis in dict(rest)])
        found += [_mask(name, place, arms, bare, method)] if name != method else []
        found += _along("compensation", name, place, arms)
        found += _along("reconstruction", name, place, arms)
    return found


Arms = Mapping[tuple[str, str], Point]
Rest = tuple[tuple[str, str], ...]


def _groups(task: TaskSummary) -> Mapping[tuple[str, Rest], Arms]:
    """Method and the other axes -> (compensation, reconstruction) -> point."""
    groups: dict[tuple[str, Rest], dict[tuple[str, str], Point]] = {}
    for point in task.points:
        rest = tuple(item for item in point.axes.items() if item[0] not in ("method", *ARMS))
        arm = point.axes.get("compensation", "none"), point.axes.get("reconstruction", "none")
        groups.setdefault((point.method, rest), {})[arm] = point
    return groups


def _mask(name: str, place: str, arms: Arms, bare: Sequence[Point], reference: str | None) -> Part:
    point = arms.get(("none", "none"))
    if point is None:
        return Part("mask", name, place, None, None, "no run without compensation and reconstruction")
    base = counterpart(point, bare)
    if base is None:
        why = "the comparison names no reference" if reference is None else f"{reference} has no such run"
        return Part("mask", name, place, point, None, why)
    return Part("mask", name, _where(f"against {base.method}", place), point, base)


def _along(kind: Literal["compensation", "reconstruction"], name: str, place: str, arms: Arms) -> Iterator[Part]:
    """One part for each point with this compensation or reconstruction."""
    mine = ARMS.index(kind)
    other = ARMS[1 - mine]
    having = {arm: point for arm, point in arms.items() if arm[mine] != "none"}
    if not having:
        yield Part(kind, name, place, None, None, f"no run with {kind}")
    for arm, point in having.items():
        fixed = f"{'no' if arm[1 - mine] == 'none' else arm[1 - mine]} {other}"
        without = ("none", arm[1]) if mine == 0 else (arm[0], "none")
        base = arms.get(without)
        missing = "" if base is not None else f"no run without {kind} at {fixed}"
        yield Part(kind, name, _where(f"{arm[mine]}, at {fixed}", place), point, base, missing)


def _where(*words: str) -> str:
    return ", ".join(word for word in words if word)
