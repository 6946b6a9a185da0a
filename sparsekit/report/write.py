"""A comparison's report: one HTML file, the same as Markdown, and the results as CSV and JSON."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sparsekit.compare.plan import Comparison, Failure, Plan
from sparsekit.files import atomic_write
from sparsekit.report import export, figures, ledger, tables, words
from sparsekit.report.drawing import Figure
from sparsekit.report.headline import Headline, headline
from sparsekit.report.study import study_of
from sparsekit.report.summary import Summary, TaskSummary, summarise
from sparsekit.report.tables import Table


@dataclass(frozen=True)
class Section:
    """The part of the page on one task."""

    name: str
    anchor: str
    dense: str
    unit: str
    headline: Headline | None
    says: list[str]
    more: list[str]
    figures: list[Figure]
    reached: list[Table]
    took: list[Table]


def write_report(directory: Path, output: Path | None = None) -> Path:
    """Write a comparison's report from its records; existing files are replaced one by one.

    Args:
        directory: of the comparison.
        output: folder of the report; default `report` in the comparison's directory.

    Returns:
        The path of `report.html`; beside it are report.md, results.csv, costs.csv and results.json.

    Raises:
        RecordError: there is no comparison, its files are damaged, or the folder cannot be written.
    """
    summary = summarise(Comparison.load(directory))
    folder = directory / "report" if output is None else output
    content = _content(summary, directory, output)
    files = {
        "results.csv": export.results_csv(summary),
        "costs.csv": export.costs_csv(summary),
        "results.json": export.results_json(summary),
        "report.md": _render("report.md.j2", content),
        "report.html": _render("report.html.j2", content),  # last: the files that it links to exist
    }
    for name, text in files.items():
        atomic_write(folder / name, text.encode())
    return folder / "report.html"


def _render(template: str, content: dict[str, object]) -> str:
    environment = Environment(
        loader=PackageLoader("sparsekit.report"),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=None if template.endswith(".html.j2") else _markdown,
    )
    environment.filters["drawing"] = lambda figure: Markup(figure.svg)  # our own SVG, with escaped text
    environment.filters["cell"] = _markdown_cell
    return environment.get_template(template).render(content)


def _markdown(value: object) -> object:
    """Text without raw HTML; the output of a macro, which passes through here again, is not changed."""
    return value.replace("<", "&lt;") if isinstance(value, str) and not isinstance(value, Markup) else value


def _markdown_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _content(summary: Summary, directory: Path, output: Path | None) -> dict[str, object]:
    """The variables of the templates."""
    comparison = summary.comparison
    times = [time for s in summary.states if s.record for time in (s.record.started, s.record.finished) if time]
    command = ["sparsekit", "report", str(directory), *(["--output", str(output)] if output is not None else [])]
    return {
        "plan": comparison.plan,
        "counts": {state: summary.count(state) for state in ("finished", "failed", "unfinished")},
        "degraded": sum(bool(s.record and s.record.degraded) for s in summary.states),
        "begun": min(times, default=None),
        "ended": max(times, default=None),
        "warnings": words.warnings(summary),
        "limits": words.limits(summary),
        "study": study_of(comparison),
        "tuning": words.tuning(comparison.tuning),
        "trials": ledger.trials(comparison.tuning) if comparison.tuning is not None else None,
        "sections": [_section(task, f"task-{i}", comparison.plan) for i, task in enumerate(summary.tasks)],
        "departures": ledger.departures(summary),
        "mishaps": ledger.mishaps(summary),
        "details": _details(summary),
        "machines": ledger.machines(summary),
        "command": shlex.join(command),
        "file": yaml.safe_dump(comparison.plan.file, sort_keys=False, allow_unicode=True).rstrip(),
    }


def _section(task: TaskSummary, anchor: str, plan: Plan) -> Section:
    study = bool(plan.file.get("study"))  # has figures and sentences of its own; those by method are one line a setting
    took = [ledger.cost(task), ledger.reached(task), ledger.multiply_adds(task), ledger.losses(task)]
    return Section(
        name=task.name,
        anchor=anchor,
        dense=words.dense(task),
        unit=f", in{task.metric.unit}" if task.metric.unit else "",
        headline=None if study else headline(task, plan.reference),
        says=[] if study else words.of_task(task, plan.reference),
        more=[] if study else words.by_method(task),
        figures=[] if study else figures.of_task(task, anchor),
        reached=list(tables.of_task(task, plan.reference)),
        took=[table for table in took if table is not None],
    )


def _details(summary: Summary) -> dict[str, Failure]:
    """Failures that have a traceback, by the name of the run's directory."""
    failures = summary.comparison.failures
    failed = [s.run.directory for s in summary.states if s.state == "failed"]
    return {Path(name).name: failures[name] for name in failed if failures[name].details}
