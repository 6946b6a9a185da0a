"""The output for people: progress of long work, the summary, the preview."""

from __future__ import annotations

import json
import math
import sys
from types import TracebackType
from typing import Self

from rich.console import JustifyMethod
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from sparsekit.cli.terminal import console as terminal
from sparsekit.cli.terminal import marked
from sparsekit.problem.unused import UNUSED
from sparsekit.pruning.events import Event, PhaseStarted, StepCompleted
from sparsekit.runs.preview import Preview, planned
from sparsekit.runs.run import Outcome
from sparsekit.runs.schema import RunRecord
from sparsekit.runs.settings import ResolvedRun
from sparsekit.runs.tracking_store import ui_command


class ProgressDisplay:
    """Progress bars on standard error; nothing where that is not a terminal."""

    def __init__(self, resolved: ResolvedRun) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=terminal(stderr=True),
            disable=not sys.stderr.isatty(),
            transient=True,
        )
        name, task = resolved.estimator.cls.name, resolved.task.cls.name
        self._steps: TaskID = self._bars.add_task(f"{name} on {task}", total=len(planned(resolved)), note="")
        self._phase: TaskID = self._bars.add_task("prepare", total=None, note="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bars.stop()

    def event(self, event: Event) -> None:
        """Follow the pruner."""
        if isinstance(event, PhaseStarted):
            self._bars.update(self._steps, note=f"to {event.step.sparsity:.1%}")
            self._bars.reset(self._phase, description=event.phase, total=None, note="")
        elif isinstance(event, StepCompleted):
            self._bars.update(self._steps, completed=event.step.index + 1)

    def progress(self, phase: str, done: int, total: int) -> None:
        """Follow long work within a phase."""
        note = f"{done}/{total}" if total > 1 else ""
        self._bars.update(self._phase, description=phase, completed=done, total=total or None, note=note)


#: A measured increase so many times the predicted one, and more than this fraction of the dense loss, deserves a hint.
BEYOND, NOTICEABLE = 5, 0.5


class Lines:
    """Progress of many runs: a bar on a terminal, elsewhere a line for each finished run."""

    def __init__(self) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=terminal(stderr=True),
            disable=not sys.stderr.isatty(),
            transient=True,
        )
        self._bar: TaskID = self._bars.add_task("planning", total=None)
        self._last = ""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bars.stop()

    def tell(self, what: str, done: int, total: int) -> None:
        """Follow the work."""
        self._bars.update(self._bar, description=what, completed=done, total=total)
        # without a terminal each thing that is done gets a line; of a training, only that it has begun
        if self._bars.disable and not (what == self._last and what.startswith("preparing")):
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)
        self._last = what


def summary(outcome: Outcome) -> dict[str, object]:
    """The summary for scripts; accuracies as fractions."""
    record = outcome.record
    return {
        "run": outcome.path.name,
        "record": str(outcome.path / "record.json"),
        "dense": record.dense,
        "levels": [
            {
                "sparsity": level.sparsity,
                "achieved": level.achieved,
                "pruned": level.pruned,
                "finetuned": level.finetuned,
                "predicted_increase": finite(level.predicted_increase),
                "measured_increase": finite(level.measured_increase),
                "reconstructed_increase": finite(level.reconstructed_increase),
            }
            for level in record.levels
        ],
        "seconds": record.seconds,
        "peak_memory_bytes": record.peak_memory_bytes,
        "degraded": record.degraded,
    }


def finite(value: float) -> float | None:
    """The value, or None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def print_summary(outcome: Outcome, as_json: bool = False) -> None:
    """Print the results of a run."""
    if as_json:
        sys.stdout.write(json.dumps(summary(outcome), indent=2) + "\n")
        return
    record, console = outcome.record, terminal()
    if outcome.repeated:
        console.print("This run was finished before; nothing was done now (--fresh does it again).")
    metrics = list(record.dense)
    preset = record.settings.get("preset")
    named = f"{preset}: " if preset else ""
    how, fitted = record.settings["compensation"]["how"], record.settings["reconstruction"]["how"]
    and_fitted = "" if fitted == "none" else f", {fitted} reconstruction"
    table = Table(title=f"{named}{record.estimator} on {record.task}, {how} compensation{and_fitted}")
    rebuilt = ["rebuilt ΔL"] if fitted != "none" else []
    for column in ("sparsity", "", *metrics, "predicted ΔL", "measured ΔL", *rebuilt):
        justify: JustifyMethod = "left" if column == "" else "right"
        table.add_column(column, justify=justify, no_wrap=column == "")
    table.add_row("0 %", "dense", *(_figure(m, record.dense[m]) for m in metrics), "", "")
    for level in record.levels:
        asked = f"{level.achieved:.2%}" if abs(level.achieved - level.sparsity) > 5e-5 else f"{level.sparsity:.4g}"
        asked = f"{100 * level.sparsity:g} %" if not asked.endswith("%") else f"{asked} (of {100 * level.sparsity:g} %)"
        increase = [
            "–" if finite(value) is None else f"{value:.3g}"
            for value in (level.predicted_increase, level.measured_increase, level.reconstructed_increase)
        ][: 2 + len(rebuilt)]
        table.add_row(asked, "pruned", *(_figure(m, level.pruned[m]) for m in metrics), *increase)
        if level.finetuned is not None:
            tuned = level.finetuned
            table.add_row("", "fine-tuned", *(_figure(m, tuned[m]) for m in metrics), "", "")
    console.print(table)
    spent = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in record.seconds.items())
    console.print(f"{record.parameters['prunable']:,} prunable weights. Seconds: {spent}.")
    idle = [name for name, why in record.parameters["skipped"].items() if why == UNUSED]
    if idle:
        console.print(f"Not counted, as no gradient reaches them: {', '.join(idle)}.")
    console.print(f"Peak memory {record.peak_memory_bytes / 2**20:,.0f} MiB. Levels: {record.path}.")
    if (hint := beyond_the_model(record)) is not None:
        console.print(marked("hint:", "cyan", hint))
    for line in record.degraded:
        console.print(marked("degraded:", "yellow", line))
    console.print(f"Record: {outcome.path / 'record.json'}", soft_wrap=True, highlight=False)
    if outcome.tracking_uri is not None:
        console.print(f"MLflow: {ui_command(outcome.tracking_uri)}", soft_wrap=True, highlight=False)


def beyond_the_model(record: RunRecord) -> str | None:
    """A sentence on the first level whose cuts raised the loss far beyond what the model predicted; None: none did."""
    for level in record.levels:
        predicted, measured = level.predicted_increase, level.measured_increase
        if 0 < predicted * BEYOND < measured < math.inf and measured > NOTICEABLE * record.dense.get("loss", math.inf):
            substeps = 4 * record.settings["substeps"]
            return (
                f"at {100 * level.sparsity:g} % the cuts raised the loss by {measured:.3g}, {measured / predicted:.0f} "
                f"times what the quadratic model predicts: it does not reach so far. --substeps {substeps} takes "
                "smaller cuts, with the curvature computed anew before each."
            )
    return None


def _figure(metric: str, value: float) -> str:
    return f"{value:.2%}" if metric.rpartition("/")[2] == "accuracy" else f"{value:.4f}"


def print_preview(preview: Preview, as_json: bool) -> None:
    """Print what a run would do."""
    space = preview.space
    if as_json:
        plain = {
            "settings": preview.settings,
            "device": preview.device,
            "prunable": {info.name: list(info.shape) for info in space.parameters},
            "skipped": space.skipped,
            "steps": [{"sparsity": s.sparsity, "refresh": s.refresh, "finetune": s.finetune} for s in preview.steps],
            "structures": preview.structures,
            "memory_bytes": preview.memory,
        }
        sys.stdout.write(json.dumps(plain, indent=2) + "\n")
        return
    import yaml

    console = terminal()
    console.print(yaml.safe_dump(preview.settings, sort_keys=False).rstrip(), soft_wrap=True, highlight=False)
    table = Table("parameter", "shape", "weights or why it is skipped")
    if preview.structures:
        table.add_column("modelled as")
    for info in space.parameters:
        row = info.name, " × ".join(map(str, info.shape)), f"{info.size:,}"
        table.add_row(*row, preview.structures.get(info.name, ""))
    for name, reason in space.skipped.items():
        table.add_row(name, "", f"skipped: {reason}")
    console.print(table)
    console.print("What no gradient reaches is found in the run, by its first examples, and left out unless included.")
    cuts = ", ".join(f"{s.sparsity:.1%}{'*' if s.refresh else ''}" for s in preview.steps)
    console.print(f"Steps (* refreshes the curvature): {cuts}")
    console.print(
        f"{space.size:,} prunable weights of {space.total:,} parameters; the estimator needs about "
        f"{preview.memory / 2**20:,.0f} MiB beside the model, on {preview.device}."
    )
