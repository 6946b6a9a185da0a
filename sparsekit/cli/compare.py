"""`sparsekit compare`: many runs under one protocol, from one file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from sparsekit.cli.display import Lines
from sparsekit.cli.terminal import console as terminal
from sparsekit.cli.terminal import keep, marked
from sparsekit.compare import engine
from sparsekit.compare.engine import Engine, Sketch
from sparsekit.compare.executors import Executor, LocalExecutor, RayExecutor
from sparsekit.compare.plan import RUNS, Comparison
from sparsekit.compare.spec import ComparisonSettings
from sparsekit.compare.tuning import failed
from sparsekit.compare.upload import Uploader
from sparsekit.errors import SettingsError
from sparsekit.machine import cores, find_device, gpus
from sparsekit.registry.installed import load_registry
from sparsekit.registry.registry import Registry
from sparsekit.runs.settings import merge, parse_assignment, read_config
from sparsekit.runs.tracking_store import resolve_uri
from sparsekit.runs.validation import validated

# Options that `study` has too.
Output = Annotated[Path, typer.Option(help="Folder of the comparisons' directories.")]
DataDir = Annotated[str | None, typer.Option(help="Folder of the task's data: run.task.data_dir.")]
Checkpoint = Annotated[str | None, typer.Option(help="Dense weights: run.task.checkpoint.")]
Assignments = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting of the file.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; default as many as fit.")]
Threads = Annotated[int, typer.Option(min=1, help="Of torch in each worker.")]
ExecutorName = Annotated[str, typer.Option(help="local, or ray: $RAY_ADDRESS or an instance of its own.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Also do again what has failed.")]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow's address; default a SQLite file.")]
NoTracking = Annotated[bool, typer.Option("--no-tracking", help="Records on disk only.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan, and stop.")]


def compare(
    file: Annotated[Path, typer.Argument(help="YAML file of the comparison.")],
    output: Output = Path("results"),
    data_dir: DataDir = None,
    checkpoint: Checkpoint = None,
    assignments: Assignments = None,
    workers: Workers = None,
    threads: Threads = 1,
    executor: ExecutorName = "local",
    retry_failed: RetryFailed = False,
    tracking_uri: TrackingUri = None,
    no_tracking: NoTracking = False,
    dry_run: DryRun = False,
) -> None:
    """Compare pruning methods under one protocol. Finished runs are kept: the same command continues."""
    raw = read(file, assignments or [], data_dir, checkpoint, tracking_uri, no_tracking)
    given = validated(ComparisonSettings, raw, "")
    carry_out(given, load_registry(), output, workers, threads, executor, retry_failed, dry_run)


def carry_out(
    given: ComparisonSettings,
    registry: Registry,
    output: Path,
    workers: int | None,
    threads: int,
    executor: str,
    retry_failed: bool,
    dry_run: bool,
) -> None:
    """Do a comparison, with the options of the command; exits with 1 where not all runs are finished."""
    if executor not in EXECUTORS:
        raise SettingsError(f"there is no executor '{executor}'; known: {', '.join(EXECUTORS)}")
    sketch = engine.sketch(given, registry)
    device = find_device(sketch.points[0].resolved.settings.device)
    count = workers or engine.workers_for(cores(), sketch.memory, threads, device)
    print_sketch(given, sketch, count)
    if dry_run:
        return
    directory = output / given.name
    with Lines() as lines:
        work = Engine(given, directory, registry, tell=lines.tell)
        with work.lock():
            found, report, trouble = _work(
                work,
                lambda: EXECUTORS[executor](count, threads, sketch.memory, device),
                retry_failed,
            )
    keep(report)
    if not print_outcome(found, report, trouble):
        sys.exit(1)


EXECUTORS: dict[str, Callable[[int, int, int, torch.device], Executor]] = {
    "local": lambda workers, threads, memory, device: LocalExecutor(workers, threads, gpus(device)),
    "ray": lambda workers, threads, memory, device: RayExecutor(threads, memory, int(device.type != "cpu")),
}


def read(
    file: Path,
    assignments: Sequence[str],
    data_dir: str | None,
    checkpoint: str | None,
    uri: str | None,
    no_tracking: bool,
) -> dict[str, object]:
    """The file's settings, not validated, overridden by those of the command line."""
    task = {key: value for key, value in (("data_dir", data_dir), ("checkpoint", checkpoint)) if value is not None}
    tracking = {**({"uri": uri} if uri else {}), **({"enabled": False} if no_tracking else {})}
    raw = read_config(file)
    for section, given in (("run", {"task": task} if task else {}), ("tracking", tracking)):
        old = raw.get(section, {})
        if isinstance(old, Mapping):  # else it is refused below
            raw[section] = merge(old, given)
    return merge(raw, *(parse_assignment(text) for text in assignments))


def _work(work: Engine, executor: Callable[[], Executor], again: bool) -> tuple[Comparison, Path, str | None]:
    """Run the comparison, send it to MLflow and write the report; returns the three results."""
    from sparsekit.report import write_report  # matplotlib and scipy: other commands start without them

    given, directory, uploader = work.given, work.directory, None
    if given.tracking.enabled:
        uploader = Uploader(
            resolve_uri(given.tracking.uri, directory), given.tracking.experiment, directory, given.name
        )
        work.finished = lambda run: uploader.put(directory / run.directory)
    with executor() as made:
        found = work.run(made, again=again)
    report = write_report(directory)
    trouble = None if uploader is None else uploader.close(sorted(report.parent.iterdir()))
    return found, report, trouble


def print_sketch(given: ComparisonSettings, sketch: Sketch, workers: int) -> None:
    """Print the plan of a comparison."""
    console = terminal(stderr=True)
    axes = list(sketch.points[0].axes)
    varying = [a for a in axes if len({p.axes.get(a) for p in sketch.points}) > 1 or a == "method"]
    table = Table(*varying, title=given.name)
    for point in sketch.points:
        table.add_row(*(point.axes.get(axis, "") for axis in varying))
    console.print(table)
    fixed = ", ".join(f"{a}: {sketch.points[0].axes[a]}" for a in axes if a not in varying)
    levels = ", ".join(f"{100 * s:g} %" for s in sketch.points[0].resolved.sparsity)
    console.print(f"{fixed}; sparsities {levels}; seeds {', '.join(map(str, given.seeds))}.")
    trials = f" and {sketch.trials} trials of dampings" if sketch.trials else ""
    console.print(
        f"{sketch.runs} runs{trials}, on {workers} worker(s): about {sketch.seconds / workers / 60:.0f} minutes of "
        f"passes through the networks; factorisations and solves come on top. Up to {sketch.memory / 2**30:.1f} GiB a "
        "worker."
    )
    for line in sketch.warnings:
        console.print(marked("protocol:", "yellow", f"{line}."), highlight=False)


def print_outcome(found: Comparison, report: Path, trouble: str | None) -> bool:
    """Print the results; returns whether every run is finished."""
    console = terminal()
    finished = [run for run in found.plan.runs if found.finished(run)]
    console.print(f"{len(finished)} of {len(found.plan.runs)} runs are finished.")
    for run in found.plan.runs:
        failure = found.failures.get(run.directory)
        if failure is not None:
            varying = [axis for axis in run.axes if len({r.axes.get(axis) for r in found.plan.runs}) > 1]
            what = ", ".join([run.axes["method"], *(f"{a} {run.axes[a]}" for a in varying if a != "method")])
            console.print(marked("failed:", "red", f"{what}, seed {run.seed}: {failure.cause}"), highlight=False)
    planned = {Path(run.directory).name for run in found.plan.runs}
    others = [path for path in (found.directory / RUNS).glob("*/") if path.name not in planned | {".locks"}]
    if others:
        console.print(
            f"{len(others)} runs of an earlier file lie in {found.directory / RUNS} and are not in the report."
        )
    lost = [entry for entry in (found.tuning.tuned if found.tuning else []) if failed(entry)]
    for entry in lost:
        console.print(marked("tuning:", "red", f"a trial has failed: {', '.join(entry.axes.values())}"))
    if found.failures or lost:
        console.print("--retry-failed does them again.")
    if trouble is not None:
        later = f"'sparsekit track {found.directory}' tells MLflow later."
        console.print(marked("tracking:", "yellow", f"{trouble}. {later}"))
    console.print(f"Report: {report}", soft_wrap=True, highlight=False)
    return len(finished) == len(found.plan.runs)
