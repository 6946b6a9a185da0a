"""A comparison's file: the compared methods and the protocol, validated and expanded before any run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal

from pydantic import Field, model_validator

from sparsekit.errors import SettingsError, SparsekitError
from sparsekit.methods.estimators import Identity
from sparsekit.methods.interfaces import Settings
from sparsekit.methods.plain_values import shown
from sparsekit.registry.registry import Registry
from sparsekit.runs.settings import (
    ResolvedRun,
    RunSettings,
    Sparsity,
    TrackingSettings,
    merge,
    resolve,
)
from sparsekit.runs.validation import SHORTHAND

#: The axes that every point has.
RESERVED = ("task", "method", "compensation", "reconstruction", "pattern", "schedule")

#: Largest number of characters in the name of a comparison, method or axis: names head columns and name files.
LONGEST_NAME = 100

#: Largest number of runs in one comparison; each is a directory.
MOST_RUNS = 10_000

#: Bytes that a worker needs beside its estimator: interpreter, torch, data and activations.
WORKER_BYTES = 1 << 30


class TuningSettings(Settings):
    """The same search for every method: damping, in units of the mean of diag F, on the tuning half."""

    trials: int = Field(8, ge=2, le=1000, description="for each method and each value of the axes in `over`")
    low: float = Field(1e-3, gt=0, description="least damping tried, relative to the mean of diag F")
    high: float = Field(10.0, gt=0, description="largest")
    sampler: str = Field("grid", pattern="^(grid|tpe)$", description="grid: evenly in the logarithm; tpe: optuna's")
    over: tuple[str, ...] = Field(("compensation",), description="axes each value of which is tuned for itself")
    sparsity: tuple[Sparsity, ...] = Field((), description="levels whose mean result is maximised; default all")
    seed: int = Field(
        1000, ge=0, lt=2**32, description="of calibration examples and the search; none of the comparison's"
    )

    @model_validator(mode="after")
    def _in_order(self) -> TuningSettings:
        if not self.low < self.high:
            raise ValueError(f"tune.low = {self.low} must be below tune.high = {self.high}")
        return self


class ComparisonSettings(Settings):
    """A comparison: methods × axes × seeds, all based on the same `run`."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=LONGEST_NAME,
        description="of the comparison; names its folder",
    )
    run: dict[str, object] = Field({}, description="settings of a run that all share")
    methods: dict[str, dict[str, object]] = Field(
        min_length=1, description="name -> settings of a run over those; an axis that a method sets is fixed for it"
    )
    axes: dict[str, object] = Field(
        {}, description="setting of a run -> list of values; or any name -> mapping of labels to settings of a run"
    )
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="each point is run with each of them")
    reference: str | None = Field(None, description="method that the others are compared with; default magnitude")
    networks: Literal["one", "each"] = Field(
        "one", description="one dense network for all seeds, or each seed its own: it is the task's seed too"
    )
    study: bool = Field(False, description="of the loss: methods are criteria, and the report asks what ΔL predicts")
    tune: TuningSettings | None = Field(None, description="how dampings are chosen; none: they are as written")
    tracking: TrackingSettings = Field(TrackingSettings(), description="in MLflow")

    @model_validator(mode="after")
    def _consistent(self) -> ComparisonSettings:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)} names a seed twice")
        if self.tune is not None and self.tune.seed in self.seeds:
            raise ValueError(f"tune.seed = {self.tune.seed} is one of the comparison's seeds; give it one of its own")
        if self.reference is not None and self.reference not in self.methods:
            raise ValueError(f"reference = {self.reference!r} is not a method of the file: {', '.join(self.methods)}")
        return self


@dataclass(frozen=True)
class Point:
    """One cell of the comparison: a method at one value of each axis.

    Attributes:
        method: its name in the file.
        chosen: axis of the file -> label of its value, without axes that the method fixes.
        settings: of the run, without a seed.
        resolved: the same with all names resolved, at the first seed.
    """

    method: str
    chosen: Mapping[str, str]
    settings: Mapping[str, object]
    resolved: ResolvedRun

    @property
    def name(self) -> str:
        """A name for messages."""
        return ", ".join([self.method, *self.chosen.values()])

    @property
    def axes(self) -> dict[str, str]:
        """Axis -> value in words; all points of a comparison have the same axes, except those that a method fixes."""
        run, names = self.resolved.settings, self.resolved.names
        parts = {1: ""}.get(run.substeps, f", {run.substeps} sub-steps")
        return {
            "task": names["task"],
            "method": self.method,
            "compensation": run.compensation.how,
            "reconstruction": run.reconstruction.how,
            "pattern": names["pattern"],
            "schedule": f"{names['schedule']}{parts}",
            **self.chosen,
        }

    @property
    def tunable(self) -> bool:
        """Whether it depends on a damping."""
        return self.resolved.estimator.cls is not Identity


def expand(given: ComparisonSettings, registry: Registry) -> list[Point]:
    """All points, in the file's order: methods first, then axes.

    Raises:
        SettingsError: a setting is not valid; the message says of which method.
    """
    points = []
    axes = {axis: _values(axis, values) for axis, values in given.axes.items()}
    _check_names(given.methods, axes)
    count = prod([len(given.methods), len(given.seeds), *map(len, axes.values())])
    if count > MOST_RUNS:
        raise SettingsError(
            f"the file asks for up to {count:,} runs (methods × axes × seeds); at most {MOST_RUNS:,} are a comparison"
        )
    for axis in given.tune.over if given.tune else ():
        if axis not in (*axes, *RESERVED):
            raise SettingsError(f"tune.over names '{axis}', which is no axis; known: {', '.join([*axes, *RESERVED])}")
    for method, own in given.methods.items():
        free = [axis for axis in axes if axis not in own]
        for labels in product(*(axes[axis] for axis in free)):
            chosen = dict(zip(free, labels, strict=True))
            layers = [axes[axis][label] for axis, label in chosen.items()]
            settings = merge(given.run, own, *layers)
            if settings.get("preset") is None:
                settings = merge(PROTOCOL, settings)
            for fixed in ("seed", "output", "tracking"):
                if fixed in settings:
                    raise SettingsError(f"'{fixed}' is the comparison's own; leave it out of `run`, methods and axes")
            where = ", ".join([method, *chosen.values()])
            try:
                resolved = resolve({**settings, "seed": given.seeds[0]}, registry)
            except SparsekitError as error:
                raise type(error)(f"{where}: {error}") from error
            points.append(Point(method, chosen, settings, resolved))
    _distinct(points)
    return points


#: What is the same for all methods unless the file says otherwise, whatever an estimator's own defaults are.
PROTOCOL = {"compensation": "joint", "reconstruction": "none", "batch_norm": "kept"}


def _check_names(methods: Iterable[str], axes: Mapping[str, Iterable[str]]) -> None:
    for name in (*methods, *axes, *(label for labels in axes.values() for label in labels)):
        if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
            raise SettingsError(
                f"the name {shown(name)} of a method, an axis or a value cannot be shown; 1 to {LONGEST_NAME} "
                "printable characters were needed: give the axis as label: settings, or another name"
            )


def _values(axis: str, given: object) -> dict[str, dict[str, object]]:
    """The values of one axis: label -> settings of a run."""
    if not given:
        raise SettingsError(f"axes.{axis} has no values; give some, or leave it out")
    if isinstance(given, Mapping):
        if axis in RESERVED:
            raise SettingsError(
                f"axes.{axis} gives labels of its own, but what a run's {axis} is called the report takes from the "
                "run; give a list of values, or the axis another name"
            )
        for label, settings in given.items():
            if not isinstance(settings, Mapping):
                raise SettingsError(f"axes.{axis}.{label} = {settings!r}; a mapping of a run's settings was needed")
        return {str(label): dict(settings) for label, settings in given.items()}
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise SettingsError(
            f"axes.{axis} = {given!r}; a list of values, or a mapping of labels to settings, was needed"
        )
    if axis not in RunSettings.model_fields:
        raise SettingsError(
            f"axes.{axis} is a list, and a run has no setting '{axis}'; give a mapping of labels to settings, or one "
            f"of {', '.join(RunSettings.model_fields)}"
        )
    found = {_label(axis, value): {axis: value} for value in given}
    if len(found) < len(given):
        raise SettingsError(f"axes.{axis} has two values of one name; give another axis as label: settings")
    return found


def _label(axis: str, value: object) -> str:
    if isinstance(value, Mapping):
        named = value.get(SHORTHAND.get(axis, "name"))
        if named is None:
            raise SettingsError(f"a value of axes.{axis}, {dict(value)}, has no name; give the axis as label: settings")
        return str(named)
    return str(value)


def _distinct(points: Sequence[Point]) -> None:
    seen: dict[str, str] = {}
    for point in points:
        settings = str({k: v for k, v in point.resolved.as_dict().items() if k != "preset"})
        if settings in seen:
            raise SettingsError(f"'{point.name}' and '{seen[settings]}' are the same run; leave one of them out")
        seen[settings] = point.name
    told: dict[str, str] = {}
    tasks: dict[str, str] = {}
    for point in points:
        axes, task = str(sorted(point.axes.items())), point.resolved.as_dict()["task"]
        if axes in told:
            raise SettingsError(
                f"'{point.name}' and '{told[axes]}' differ in nothing that a report would show; give the difference an "
                "axis of its own"
            )
        told[axes] = point.name
        if tasks.setdefault(point.axes["task"], str(task)) != str(task):
            raise SettingsError(
                f"the task '{point.axes['task']}' has two settings; two dense networks of one task are two comparisons"
            )


def departures(point: Point, registry: Registry) -> dict[str, object]:
    """Dotted name -> value, of settings that differ from the components' defaults or from the preset."""
    resolved = point.resolved
    kinds = ["estimator", "saliency", "pattern", "finetune"]
    given = resolved.as_dict()
    if resolved.settings.preset is not None:
        kinds += ["compensation", "reconstruction", "schedule"]
        published = resolve({"preset": resolved.settings.preset, "task": given["task"]}, registry).as_dict()
    else:  # each by itself: together the defaults of all need not be a run
        published = {kind: getattr(resolved, kind).cls.Settings().model_dump(mode="json") for kind in kinds[:3]}
        published["finetune"] = resolved.task.cls.finetune.model_dump(mode="json")
    found = {
        f"{kind}.{key}": value
        for kind in kinds
        for key, value in given[kind].items()
        if key != "name" and published[kind].get(key) != value
    }
    if resolved.settings.preset is not None and given["substeps"] != published["substeps"]:
        found["substeps"] = given["substeps"]
    return found


def warnings(given: ComparisonSettings, points: Sequence[Point]) -> list[str]:
    """Departures of the file from the protocol, a sentence each."""
    found = []
    runs = [point.resolved for point in points]
    levels = {run.sparsity for run in runs}
    if min(len(level) for level in levels) < 5:
        found.append(f"{min(map(len, levels))} sparsities are compared; at least five show where each method breaks")
    if len(levels) > 1:
        found.append("the points have different sparsities; only equal ones can be compared")
    if len(given.seeds) < 3:
        found.append(f"{len(given.seeds)} seed(s): no interval can be given; three are the least")
    if any(run.settings.split != "reporting" for run in runs):
        found.append("some figures are not of the reporting half: nothing in this report is a result")
    if len({str(run.finetune.model_dump()) for run in runs}) > 1:
        found.append("the points are fine-tuned by different recipes")
    if len({(run.settings.include, run.settings.exclude) for run in runs}) > 1:
        found.append("the points prune different parameters")
    plain = [p for p in points if p.resolved.saliency.cls.name == "magnitude"]
    for how in sorted({p.axes["reconstruction"] for p in points}):
        if not any(p.axes["reconstruction"] == how for p in plain):
            found.append(f"no magnitude baseline with reconstruction '{how}': what the mask is worth is not shown")
    examples = {p.resolved.estimator.settings.examples for p in points if p.tunable}
    if len(examples) > 1:
        found.append(
            f"the estimators see different numbers of examples ({', '.join(map(str, sorted(examples)))}): the view 'as "
            "published', not that of equal information"
        )
    if given.tune is None:
        found.append("nothing is tuned: dampings are the defaults or as written in the file")
    return found
