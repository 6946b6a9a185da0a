"""The report of a study of loss modelling: what ΔL depends on, and what it predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from sparsekit.compare.plan import Comparison, PlannedRun
from sparsekit.compare.study import FEWEST_NETWORKS, JOINT
from sparsekit.report.correlation import Correlation, kendall, spearman
from sparsekit.report.drawing import Figure
from sparsekit.report.spread import Difference, Spread, percent, significant
from sparsekit.report.study_figures import figures_of
from sparsekit.report.tables import Cell, Table
from sparsekit.runs.schema import LevelRecord, RunRecord


@dataclass(frozen=True)
class Network:
    """One pruned network of a study.

    Attributes:
        criterion: its name in the file.
        penalty: λ; None where the criterion has none.
        substeps: π.
        group: values of the further axes that vary, in words; '' without any.
        seed: of the run.
        sparsity: asked for.
        increases: split -> ΔL, the loss after the cut minus the dense network's.
        errors: split -> after fine-tuning, or after the cut where there was none: 1 − accuracy, or the loss.
        predicted, measured: ΔL on the calibration examples over all cuts, by the criterion's own model and in truth.
        seconds: of the curvature and the choice of weights, over all cuts.
    """

    criterion: str
    penalty: float | None
    substeps: int
    group: str
    seed: int
    sparsity: float
    increases: Mapping[str, float]
    errors: Mapping[str, float]
    predicted: float
    measured: float
    seconds: float

    @property
    def setting(self) -> tuple[str, float | None, int, str, float]:
        """What all seeds of it share."""
        return self.criterion, self.penalty, self.substeps, self.group, self.sparsity


@dataclass(frozen=True)
class Study:
    """The part of the report that only a study has.

    Attributes:
        says: sentences.
        figures, tables: of the report.
    """

    says: list[str]
    figures: list[Figure]
    tables: list[Table]


def study_of(comparison: Comparison) -> Study | None:
    """The study's part of the report; None where the comparison is no study or nothing is finished."""
    if not comparison.plan.file.get("study"):
        return None
    found = networks(comparison)
    if not found:
        return None
    return Study(
        sentences(found), figures_of(found), [settings(found), correlations(found), strata(found), costs(found)]
    )


def networks(comparison: Comparison) -> list[Network]:
    """All networks of finished runs, in the plan's order."""
    axes = dict(comparison.plan.file["axes"])  # type: ignore[call-overload]
    further = [axis for axis in axes if axis != "substeps"]
    finished = [(run, comparison.records[run.directory]) for run in comparison.plan.runs if comparison.finished(run)]
    return [_network(run, record, level, further) for run, record in finished for level in record.levels]


def _network(run: PlannedRun, record: RunRecord, level: LevelRecord, further: Sequence[str]) -> Network:
    criterion, _, penalty = run.axes["method"].partition(JOINT)
    own = record.settings["split"]

    def by_split(read: Callable[[str], float | None]) -> dict[str, float]:
        splits = {own: "", **{split: f"{split}/" for split in record.settings["also_measured"]}}
        values = {split: read(prefix) for split, prefix in splits.items()}
        return {split: value for split, value in values.items() if value is not None}

    last = level.pruned if level.finetuned is None else level.finetuned

    def error(prefix: str) -> float | None:
        if f"{prefix}accuracy" in last:
            return 1 - last[f"{prefix}accuracy"]
        return last.get(f"{prefix}loss")

    return Network(
        criterion=criterion,
        penalty=float(penalty) if penalty else None,
        substeps=int(record.settings["substeps"]),
        group=", ".join(run.axes[axis] for axis in further if axis in run.axes),
        seed=run.seed,
        sparsity=level.sparsity,
        increases=by_split(lambda prefix: level.pruned[f"{prefix}loss"] - record.dense[f"{prefix}loss"]),
        errors=by_split(error),
        predicted=level.predicted_increase,
        measured=level.measured_increase,
        seconds=sum(step.seconds.get(part, 0.0) for step in record.steps for part in ("curvature", "removal")),
    )


def parts(found: Iterable[Network]) -> dict[tuple[str, float], list[Network]]:
    """(Group, sparsity) -> its networks, in the plan's order."""
    out: dict[tuple[str, float], list[Network]] = {}
    for network in found:
        out.setdefault((network.group, network.sparsity), []).append(network)
    return out


def seeds_of(found: Iterable[Network], read: Callable[[Network], float]) -> dict[int, float]:
    """Seed -> a figure."""
    return {network.seed: read(network) for network in found}


def best(found: Sequence[Network]) -> list[Network]:
    """Those at the λ of least mean ΔL on the tuning half (that of the run where it was not measured), of one kind."""
    by_penalty: dict[float | None, list[Network]] = {}
    for network in found:
        by_penalty.setdefault(network.penalty, []).append(network)

    def mean(some: Sequence[Network]) -> float:
        values = [network.increases.get("tuning", next(iter(network.increases.values()))) for network in some]
        return sum(values) / len(values)

    return min(by_penalty.values(), key=lambda some: (-len(some), mean(some)))


def chosen(found: Sequence[Network]) -> dict[tuple[str, int], list[Network]]:
    """(Criterion, π) -> its networks at the best λ."""
    kinds: dict[tuple[str, int], list[Network]] = {}
    for network in found:
        kinds.setdefault((network.criterion, network.substeps), []).append(network)
    return {kind: best(some) for kind, some in kinds.items()}


# -- tables ------------------------------------------------------------------------------------------------
def _spread(values: Mapping[int, float], text: Callable[[float], str] = significant) -> Cell:
    spread = Spread.of(values)
    if spread is None:
        return Cell("–")
    details = (f"{text(spread.low)} to {text(spread.high)}",) if spread.n > 1 else ()
    return Cell(text(spread.mean), details)


def error_text(found: Sequence[Network]) -> Callable[[float], str]:
    """How errors are written: % of examples, or a loss."""
    fractions = all(0 <= error <= 1 for network in found for error in network.errors.values())
    return (lambda value: f"{100 * value:.2f}") if fractions else significant


def settings(found: Sequence[Network]) -> Table:
    """ΔL and error of each criterion at each π, λ chosen on the tuning half."""
    splits = list(dict.fromkeys(split for network in found for split in network.increases))
    rows, text = [], error_text(found)
    for (group, sparsity), some in parts(found).items():
        for (criterion, substeps), few in chosen(some).items():
            penalty = few[0].penalty
            head = [group] if group else []
            rows.append(
                (
                    *(Cell(part) for part in (*head, percent(sparsity), criterion, str(substeps))),
                    Cell("–" if penalty is None else f"{penalty:g}"),
                    *(_spread(seeds_of(few, lambda n, s=split: n.increases[s])) for split in splits),  # type: ignore[misc]
                    *(_spread(seeds_of(few, lambda n, s=split: n.errors[s]), text) for split in splits),  # type: ignore[misc]
                )
            )
    heads = (*(("further axes",) if any(n.group for n in found) else ()), "sparsity", "criterion", "π", "λ")
    columns = (*heads, *(f"ΔL, {split}" for split in splits), *(f"error, {split}" for split in splits))
    note = "Mean over the seeds and range; error after fine-tuning where there was any, in % of the examples."
    return Table(
        "ΔL and error at the λ of least ΔL on the tuning half", columns, tuple(rows), heads=len(heads), notes=(note,)
    )


def over_settings(found: Sequence[Network], x: str, y: str) -> tuple[list[float], list[float]]:
    """Means over the seeds of ΔL on split x and of the error on split y, one point for each setting."""
    groups: dict[object, list[Network]] = {}
    for network in found:
        groups.setdefault(network.setting, []).append(network)
    pairs = [
        tuple(sum(values) / len(values) for values in ([n.increases[x] for n in some], [n.errors[y] for n in some]))
        for some in groups.values()
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]


def within_seeds(
    found: Sequence[Network], x: str, y: str, measure: Callable[[Sequence[float], Sequence[float]], Correlation]
) -> Difference | None:
    """The correlation within each seed: their mean with its interval over seeds."""
    values = {}
    for seed, some in groupby(sorted(found, key=lambda n: n.seed), key=lambda n: n.seed):
        few = list(some)
        if len(few) >= FEWEST_NETWORKS:
            values[seed] = measure([n.increases[x] for n in few], [n.errors[y] for n in few]).value
    return Difference.of(values, dict.fromkeys(values, 0.0))


def correlations(found: Sequence[Network]) -> Table:
    """Rank correlations of ΔL with the error, over networks of one sparsity and within seeds."""
    rows = []
    splits = list(dict.fromkeys(split for network in found for split in network.increases))
    whole = [("all together", some) for some in _by_sparsity(found).values()] if any(n.group for n in found) else []
    for group, some in [*((group, few) for (group, _), few in parts(found).items()), *whole]:
        for split in splits:
            x, y = over_settings(some, split, splits[0])
            cells = [Cell(part) for part in (*([group] if group or whole else []), percent(some[0].sparsity), split)]
            for measure in (spearman, kendall):
                if len(x) < FEWEST_NETWORKS:
                    cells += [Cell(f"fewer than {FEWEST_NETWORKS} networks"), Cell("–")]
                    continue
                inner = within_seeds(some, split, splits[0], measure)
                cells += [Cell(measure(x, y).text), Cell("–" if inner is None else _signed(inner))]
            rows.append((*cells, Cell(str(len(x)))))
    heads = (*(("further axes",) if whole else ()), "sparsity", "ΔL on")
    columns = (*heads, "Spearman's ρ", "within seeds", "Kendall's τ", "within seeds", "networks")
    notes = (
        f"Of ΔL with the error on {splits[0]}. Over networks: means over the seeds, 95 % bootstrap interval over the "
        "networks. Within seeds: mean of the seeds' own correlations, 95 % t interval over seeds.",
    )
    return Table("Does ΔL predict the error?", columns, tuple(rows), heads=len(heads), notes=notes)


def alike(found: Sequence[Network]) -> dict[str, list[Network]]:
    """'criterion QM' or 'π = 14' -> its networks, where there are several of a kind and enough of each."""
    kinds: dict[str, list[Network]] = {}
    if len({network.criterion for network in found}) > 1:
        for network in found:
            kinds.setdefault(f"criterion {network.criterion}", []).append(network)
    if len({network.substeps for network in found}) > 1:
        for network in sorted(found, key=lambda n: n.substeps):
            kinds.setdefault(f"π = {network.substeps}", []).append(network)
    return {kind: some for kind, some in kinds.items() if len({n.setting for n in some}) >= FEWEST_NETWORKS}


def strata(found: Sequence[Network]) -> Table:
    """Spearman's correlation of ΔL with the error among networks of one criterion, and among those of one π."""
    grouped, rows = any(n.group for n in found), []
    for (group, sparsity), some in parts(found).items():
        split = _split(some)
        for kind, few in alike(some).items():
            head = [*([group] if grouped else []), percent(sparsity), kind]
            x, y = over_settings(few, split, split)
            inner = within_seeds(few, split, split, spearman)
            cells = (*head, spearman(x, y).text, "–" if inner is None else _signed(inner), str(len(x)))
            rows.append(tuple(map(Cell, cells)))
    heads = (*(("further axes",) if grouped else ()), "sparsity", "among")
    notes = (
        "A correlation over all networks may be owed to what they differ in besides ΔL; these hold one thing fixed.",
    )
    columns = (*heads, "Spearman's ρ", "within seeds", "networks")
    return Table(
        "The same among networks of one criterion, of one π", columns, tuple(rows), heads=len(heads), notes=notes
    )


def _by_sparsity(found: Sequence[Network]) -> dict[float, list[Network]]:
    out: dict[float, list[Network]] = {}
    for network in found:
        out.setdefault(network.sparsity, []).append(network)
    return out


def _signed(found: Difference) -> str:
    if found.interval is None:
        return f"{found.mean:+.2f}"
    low, high = (
        max(-1.0, min(1.0, end)) for end in found.interval
    )  # a t interval knows no bounds, a correlation has them
    return f"{found.mean:+.2f} ({low:+.2f} to {high:+.2f})"


def costs(found: Sequence[Network]) -> Table:
    """Seconds of curvature and choice, by criterion and π."""
    kinds: dict[tuple[str, str, int], dict[tuple[int, float | None], float]] = {}
    for network in found:
        kinds.setdefault((network.group, network.criterion, network.substeps), {})[network.seed, network.penalty] = (
            network.seconds
        )
    grouped = any(group for group, _, _ in kinds)
    rows = tuple(
        (
            *((Cell(group),) if grouped else ()),
            Cell(criterion),
            Cell(str(substeps)),
            _spread(dict(enumerate(values.values()))),
            _spread({i: value / substeps for i, value in enumerate(values.values())}),
        )
        for (group, criterion, substeps), values in kinds.items()
    )
    heads = (*(("further axes",) if grouped else ()), "criterion", "π")
    return Table(
        "Seconds of curvature and choice", (*heads, "in all", "for each cut"), rows, heads=len(heads),
        notes=("Wall clock, mean and range over λ and seeds; fine-tuning not counted.",),
    )  # fmt: skip


# -- sentences ---------------------------------------------------------------------------------------------
def sentences(found: Sequence[Network]) -> list[str]:
    """What the data shows and what it does not."""
    out = []
    for (group, sparsity), some in parts(found).items():
        where = f"At {percent(sparsity)}{f', {group}' if group else ''}: "
        out += [where + line for line in (*_locality(some), *_orders(some), *_prediction(some))]
    seeds, sparsities = ({n.seed for n in found}, {n.sparsity for n in found})
    out.append(
        f"{len(found)} networks, {len(seeds)} seed(s), {len(sparsities)} sparsity level(s), one architecture: nothing "
        "here speaks of others. Intervals are each by itself. λ was chosen on the tuning half by ΔL, errors played no "
        "part in it."
    )
    return out


def _split(some: Sequence[Network]) -> str:
    return next(iter(some[0].increases))


def _change(before: Sequence[Network], after: Sequence[Network], text: Callable[[float], str]) -> str:
    """'ΔL by −0.31 (−0.40 to −0.22), error by −1.20 points (a tie)'."""
    split, out = _split(before), []
    reads: list[tuple[str, Callable[[Network], float], Callable[[float], str]]] = [
        ("ΔL", lambda n: n.increases[split], significant),
        ("error", lambda n: n.errors[split], text),
    ]
    for name, read, shown in reads:
        found = Difference.of(seeds_of(after, read), seeds_of(before, read))
        if found is None:
            continue
        if found.interval is None:
            interval = f"{found.n} seed(s), no interval"
        else:
            low, high = found.interval
            tie = ": a tie" if low <= 0 <= high else ""
            interval = f"{shown(low)} to {shown(high)}{tie}"
        out.append(f"{name} by {shown(found.mean)} ({interval})")
    return ", ".join(out)


def _locality(some: Sequence[Network]) -> list[str]:
    kinds, out = chosen(some), []
    for criterion in dict.fromkeys(name for name, _ in kinds):
        stages = sorted(stage for name, stage in kinds if name == criterion)
        if len(stages) > 1:
            first, last = kinds[criterion, stages[0]], kinds[criterion, stages[-1]]
            change = _change(first, last, error_text(some))
            out.append(f"{criterion}: from π = {stages[0]} to {stages[-1]}, each at its λ, changes {change}.")
    return out


def _orders(some: Sequence[Network]) -> list[str]:
    kinds = chosen(some)
    most = max(stage for _, stage in kinds)
    names = [name for name, stage in kinds if stage == most]
    if len(names) < 2:
        return []
    first = names[0]
    return [
        f"At π = {most}, {name} in place of {first} changes "
        f"{_change(kinds[first, most], kinds[name, most], error_text(some))}."
        for name in names[1:]
    ]


def _prediction(some: Sequence[Network]) -> list[str]:
    split = _split(some)
    x, y = over_settings(some, split, split)
    if len(x) < FEWEST_NETWORKS:
        return [f"{len(x)} networks are too few to say whether ΔL predicts the error; {FEWEST_NETWORKS} are needed."]
    found = spearman(x, y)
    if math.isnan(found.value):
        return ["whether ΔL predicts the error cannot be said: one of the two is the same for all networks."]
    verdict = "says nothing that this data could tell from chance about" if found.low <= 0 <= found.high else (
        "rises with" if found.value > 0 else "falls with"
    )  # fmt: skip
    out = [f"over {len(x)} networks ΔL {verdict} the error (Spearman {found.text})."]
    for what in ("criterion", "π"):
        values = {
            kind.removeprefix("criterion "): spearman(*over_settings(few, split, split)).value
            for kind, few in alike(some).items()
            if kind.startswith(what)
        }
        if values:
            each = ", ".join(f"{kind} {value:+.2f}" for kind, value in values.items())
            out.append(f"among networks of one {what}, Spearman is: {each}.")
    return out
