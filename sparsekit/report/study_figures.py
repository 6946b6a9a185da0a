"""The figures of a study: ΔL against π and λ, predicted against measured, ΔL against error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from matplotlib.axes import Axes

from sparsekit.report.drawing import MOST, Figure, Panel, Styles, draw, literal, styles
from sparsekit.report.spread import Spread, percent

if TYPE_CHECKING:
    from sparsekit.report.study import Network


def figures_of(found: Sequence[Network]) -> list[Figure]:
    """Four figures for each value of the further axes and each sparsity."""
    out = []
    keys = dict.fromkeys((n.group, n.sparsity) for n in found)
    for i, key in enumerate(keys):
        some = [n for n in found if (n.group, n.sparsity) == key]
        name, where = f"study-{i}", ", ".join(part for part in (percent(key[1]), key[0]) if part)
        out += [against_substeps(some, f"{name}-pi", where), against_penalty(some, f"{name}-lambda", where)]
        out += [predictions(some, f"{name}-predicted", where), errors(some, f"{name}-error", where)]
    return [figure for figure in out if figure is not None]


def _split(some: Sequence[Network]) -> str:
    return next(iter(some[0].increases))


def _scale(axes: Axes, values: Sequence[float], which: str) -> None:
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) > 10 * min(finite):
        getattr(axes, f"set_{which}scale")("log")
    elif finite and max(map(abs, finite)) > 100 * (sorted(map(abs, finite))[len(finite) // 4] or 1.0):
        getattr(axes, f"set_{which}scale")("symlog", linthresh=max(1e-3, max(map(abs, finite)) / 1e4))


def _lines(
    some: Sequence[Network], x: Callable[[Network], float], label: Callable[[Network], str], axes: Axes, known: Styles
) -> None:
    """Mean ΔL over seeds against x, a line for each label, bars from the least to the greatest."""
    split = _split(some)
    for name in dict.fromkeys(map(label, some)):
        rows: dict[float, dict[int, float]] = {}
        for network in some:
            if label(network) == name:
                rows.setdefault(x(network), {})[network.seed] = network.increases[split]
        places = sorted(rows)
        spreads = [spread for place in places if (spread := Spread.of(rows[place])) is not None]
        axes.plot(places, [spread.mean for spread in spreads], **known[name].line())
        low, high = [s.low for s in spreads], [s.high for s in spreads]
        axes.fill_between(places, low, high, color=known[name].colour, alpha=0.15, linewidth=0)
    _scale(axes, [network.increases[split] for network in some], "y")
    axes.set_ylabel(f"ΔL, {split}")


def _penalty(network: Network) -> str:
    return "no λ" if network.penalty is None else f"λ = {network.penalty:g}"


def against_substeps(some: Sequence[Network], name: str, where: str) -> Figure | None:
    """ΔL against π, a panel for each criterion with more than one, a line for each λ."""
    several = {c for c in {n.criterion for n in some} if len({n.substeps for n in some if n.criterion == c}) > 1}
    criteria = [c for c in dict.fromkeys(n.criterion for n in some) if c in several]
    if not criteria:
        return None
    plain = [n for n in some if n.criterion not in several]

    def body(criterion: str, axes: Axes, known: Styles) -> None:
        _lines([n for n in some if n.criterion == criterion], lambda n: n.substeps, _penalty, axes, known)
        for other in dict.fromkeys(n.criterion for n in plain):
            level = [n.increases[_split(some)] for n in plain if n.criterion == other]
            axes.axhline(sum(level) / len(level), color="#555555", linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set_xscale("log")
        axes.set_xlabel("π, cuts on the way")

    labels = sorted({n.penalty for n in some if n.criterion in several}, key=lambda p: -1 if p is None else p)
    names = ["no λ" if p is None else f"λ = {p:g}" for p in labels]
    shown = [Panel(c, partial(body, c), tuple(names[:MOST])) for c in criteria]
    dotted = ", ".join(dict.fromkeys(n.criterion for n in plain))
    caption = "ΔL of the pruned network against π: mean over seeds, bands from the least to the greatest." + (
        f" Dotted: {dotted}." if dotted else ""
    )
    return draw(name, f"ΔL against locality, {where}", caption, shown, styles(names))


def against_penalty(some: Sequence[Network], name: str, where: str) -> Figure | None:
    """ΔL against λ, a panel for each π, a line for each criterion."""
    with_penalty = [n for n in some if n.penalty is not None]
    values = sorted({n.penalty for n in with_penalty if n.penalty is not None})
    if len(values) < 2:
        return None
    least = next(value for value in values if value > 0)

    def body(stage: int, axes: Axes, known: Styles) -> None:
        few = [n for n in with_penalty if n.substeps == stage]
        _lines(few, lambda n: n.penalty or 0.0, lambda n: n.criterion, axes, known)
        axes.set_xscale("symlog", linthresh=least)
        axes.set_xlabel("λ (log scale, from 0)")

    stages = sorted({n.substeps for n in with_penalty})
    names = list(dict.fromkeys(n.criterion for n in with_penalty))
    shown = [Panel(f"π = {stage}", partial(body, stage), tuple(names)) for stage in stages]
    caption = "ΔL of the pruned network against the norm penalty: mean over seeds, bands from least to greatest."
    return draw(name, f"ΔL against the norm penalty, {where}", caption, shown, styles(names))


def predictions(some: Sequence[Network], name: str, where: str) -> Figure | None:
    """Predicted against measured ΔL on the calibration examples, a panel for each π."""
    few = [n for n in some if math.isfinite(n.predicted) and math.isfinite(n.measured)]
    if not few:
        return None
    names = list(dict.fromkeys(n.criterion for n in few))

    def body(stage: int, axes: Axes, known: Styles) -> None:
        here = [n for n in few if n.substeps == stage]
        for criterion in dict.fromkeys(n.criterion for n in here):
            own = [n for n in here if n.criterion == criterion]
            axes.plot([n.predicted for n in own], [n.measured for n in own], **known[criterion].dots())
        _scale(axes, [n.predicted for n in few], "x")
        _scale(axes, [n.measured for n in few], "y")
        ends = [min(n.measured for n in few), max(n.measured for n in few)]
        axes.plot(ends, ends, color="#555555", linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set_xlabel("predicted ΔL")
        axes.set_ylabel("measured ΔL")

    stages = sorted({n.substeps for n in few})
    shown = [Panel(f"π = {stage}", partial(body, stage), tuple(names)) for stage in stages]
    caption = (
        "ΔL over all cuts on the examples of each estimate, by the criterion's own model without its penalty and "
        "absolute value, and in truth; every seed and λ. Dotted: equal."
    )
    return draw(name, f"Predicted against measured ΔL, {where}", caption, shown, styles(names))


def errors(some: Sequence[Network], name: str, where: str) -> Figure | None:
    """ΔL against the error, a panel for each split of ΔL."""
    names = list(dict.fromkeys(n.criterion for n in some))
    own = _split(some)
    fractions = all(0 <= error <= 1 for n in some for error in n.errors.values())

    def body(split: str, axes: Axes, known: Styles) -> None:
        for criterion in names:
            few = [n for n in some if n.criterion == criterion]
            values = [n.errors[own] * (100 if fractions else 1) for n in few]
            axes.plot([n.increases[split] for n in few], values, **known[criterion].dots())
        _scale(axes, [n.increases[split] for n in some], "x")
        _scale(axes, [n.errors[own] for n in some], "y")
        axes.set_xlabel("ΔL")
        axes.set_ylabel(literal(f"error, {own}{' in %' if fractions else ''}"))

    shown = [Panel(f"ΔL on {split}", partial(body, split), tuple(names)) for split in some[0].increases]
    caption = "Error after fine-tuning (after the cut where there was none) against ΔL; every seed, π and λ."
    return draw(name, f"ΔL against error, {where}", caption, shown, styles(names))
