"""`sparsekit run`: prune a trained network, track it, report it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from sparsekit import processes
from sparsekit.cli.display import ProgressDisplay, print_preview, print_summary
from sparsekit.cli.terminal import keep
from sparsekit.registry.installed import load_registry
from sparsekit.runs.preview import preview
from sparsekit.runs.run import execute
from sparsekit.runs.settings import merge, parse_assignment, read_config, resolve


# Longer than other functions, because every option is an argument here.
def run(
    estimator: Annotated[str | None, typer.Option(help="Curvature estimator; default fishleg.")] = None,
    task: Annotated[str | None, typer.Option(help="What is pruned; default digits.")] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(help="Fraction to remove, in [0, 1); repeat for several levels.")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="one-shot, cubic, linear or exponential.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps for each level, fine-tuned after each.")] = None,
    substeps: Annotated[int | None, typer.Option(help="Cuts within a step, curvature refreshed before each.")] = None,
    compensation: Annotated[str | None, typer.Option(help="joint, independent, none or exact.")] = None,
    reconstruct: Annotated[str | None, typer.Option(help="none, layerwise or fisher: fit layers after a cut.")] = None,
    batch_norm: Annotated[str | None, typer.Option(help="kept or anew: statistics after a cut.")] = None,
    saliency: Annotated[str | None, typer.Option(help="obs, obs-rows, magnitude, random or a plugin's.")] = None,
    pattern: Annotated[str | None, typer.Option(help="unstructured, uniform, n:m or a plugin's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random but the dense network.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder of the task's data.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="File of the dense weights.")] = None,
    preset: Annotated[str | None, typer.Option(help="A published configuration; see sparsekit plugins.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; options win over it.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. estimator.damping=1e-3."),
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder for records; default runs.")] = None,
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow's address; default a SQLite file.")] = None,
    no_tracking: Annotated[bool, typer.Option("--no-tracking", help="Records on disk only.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away an earlier run with these settings.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on standard output.")] = False,
) -> None:
    """Prune a trained network with second-order information, track the run, and report its cost."""
    options: dict[str, object] = {
        "preset": preset,
        "estimator": _some(name=estimator),
        "task": _some(name=task, data_dir=data_dir, checkpoint=checkpoint),
        "schedule": _some(name=schedule),
        "saliency": _some(name=saliency),
        "pattern": _some(name=pattern),
        "sparsity": list(sparsity) if sparsity else None,
        "steps": steps,
        "substeps": substeps,
        "compensation": compensation,
        "reconstruction": reconstruct,
        "batch_norm": batch_norm,
        "seed": seed,
        "device": device,
        "output": output,
        "tracking": _some(uri=tracking_uri, enabled=False if no_tracking else None),
    }
    layers: list[Mapping[str, object]] = [read_config(config)] if config else []
    layers += [_some(**options), *(parse_assignment(text) for text in assignments or [])]
    registry = load_registry()
    resolved = resolve(merge(*layers), registry)
    if dry_run:
        print_preview(preview(resolved), as_json)
        return
    with processes.group(resolved.settings.device) as apart:
        if apart is not None:  # what the first process shows is all there is to see
            execute(resolved, registry, resume=resume, fresh=fresh, apart=apart)
            return
        with ProgressDisplay(resolved) as show:
            outcome = execute(
                resolved, registry, resume=resume, fresh=fresh, listener=show.event, progress=show.progress
            )
    keep(outcome.path)
    print_summary(outcome, as_json)


def _some(**values: object) -> dict[str, object]:
    """The values that were given."""
    return {key: value for key, value in values.items() if value is not None and value != {}}
