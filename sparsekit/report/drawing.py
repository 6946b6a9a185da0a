"""Drawing of figures: panels with one legend below, lines that differ without colours, SVG to embed in a page.

Only this module and `figures` import matplotlib; pyplot is not used, because its state is global.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import NullLocator

#: Largest number of lines in a panel; more could not be distinguished.
MOST = 8

#: Okabe and Ito's colours, of different lightness, with markers and dashes that distinguish them in grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#000000", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))

#: Inches.
WIDTH, HEIGHT = 10.0, 3.1

#: Text is drawn as outlines, so that nothing overlaps where a font is missing; ids are the same in every execution.
LOOK: dict[Any, Any] = {
    "svg.fonttype": "path",
    "svg.hashsalt": "sparsekit",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Figure:
    """A drawing for the page.

    Attributes:
        name: unique in the page; its id.
        title: one line.
        caption: what is shown and what is left out.
        svg: an element without references to anything outside it.
    """

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        draw: called with the axes and with the style of each label in this panel.
        labels: of its lines, as in the legend.
    """

    title: str
    draw: Callable[[Axes, Styles], None]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Style:
    """The style of one line, as arguments of `Axes.plot`."""

    colour: str
    marker: str
    dash: str | tuple[int, tuple[int, ...]]

    def line(self) -> dict[str, Any]:
        """A line with markers."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "linestyle": self.dash,
            "linewidth": 1.3,
            "markersize": 5,
            "markeredgecolor": "white",
            "markeredgewidth": 0.5,
        }

    def dots(self) -> dict[str, Any]:
        """Markers alone."""
        return {**self.line(), "linestyle": "none"}


Styles = Mapping[str, Style]


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """A style for each label, the same in all panels of a figure."""
    found = {}
    for i, label in enumerate(dict.fromkeys(labels)):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]
        found[label] = Style(colour, marker, DASHES[i % len(DASHES)])
    return found


def draw(
    name: str,
    title: str,
    caption: str,
    panels: Sequence[Panel],
    known: Styles,
    *,
    columns: int = 3,
    tall: float = HEIGHT,
) -> Figure:
    """Panels side by side with common axes and one legend below, as SVG.

    Args:
        name: its id in the page.
        title: for the page and for screen readers.
        caption: for both, with what was left out.
        panels: drawn in order, `columns` in a row.
        known: the style of each label.
        columns: largest number of panels side by side.
        tall: height of one row of panels in inches.
    """
    wide = min(columns, len(panels))
    deep = -(-len(panels) // wide)
    shown = [label for label in known if any(label in panel.labels for panel in panels)]
    fitting = max(1, int(WIDTH * 13 / (max(map(len, shown), default=1) + 8)))
    legend = 0.2 * -(-len(shown) // fitting) + 0.2
    with rc_context(LOOK):
        canvas = Canvas(figsize=(WIDTH, deep * tall + legend), layout="constrained")
        FigureCanvasSVG(canvas)
        grid = canvas.subplots(deep, wide, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for i, (axes, panel) in enumerate(zip(grid.flat, panels, strict=False)):
            panel.draw(axes, known)
            axes.set_title(literal(panel.title))
            axes.tick_params(labelbottom=i + wide >= len(panels), labelleft=i % wide == 0)
            axes.set_xlabel(axes.get_xlabel() if i + wide >= len(panels) else "")
            axes.set_ylabel(axes.get_ylabel() if i % wide == 0 else "")
        handles = [grid.flat[0].plot([], [], label=literal(label), **known[label].line())[0] for label in shown]
        canvas.legend(handles=handles, loc="outside lower center", ncols=min(fitting, max(len(shown), 1)))
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    return Figure(name, title, caption, _embedded(buffer.getvalue(), name, title, caption))


def literal(text: str) -> str:
    """Text escaped for matplotlib, so that a dollar sign in a name does not begin a formula."""
    return text.replace("$", r"\$")


def _embedded(svg: str, name: str, title: str, caption: str) -> str:
    """The SVG element alone, with ids that are unique in the page, a name for screen readers, and no fixed width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'xlink:href="#([^"]*)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", svg)
    head = re.search(r'viewBox="[^"]*"', svg)
    words = f'<title id="{name}-title">{html.escape(title)}</title><desc id="{name}-desc">{html.escape(caption)}</desc>'
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {head.group() if head else ""} role="img" '
        f'aria-labelledby="{name}-title {name}-desc">{words}'
    )
    return re.sub(r"^<svg[^>]*>", lambda _: opening, svg)


def sparsity_axis(axes: Axes, sparsities: Sequence[float]) -> None:
    """Set up an axis of sparsity in %, logarithmic in the kept fraction, so that high sparsities are spread out."""
    axes.set_xlim(1.15 * (1 - min(sparsities)), (1 - max(sparsities)) / 1.15)  # first: a single sparsity has no range
    axes.set_xscale("log")
    axes.set_xticks([1 - s for s in sparsities], [f"{round(100 * s, 4):g}" for s in sparsities])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("sparsity in % (log scale of the rest)")
