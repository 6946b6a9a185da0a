"""The content of a run in MLflow, sent while it runs or afterwards from its record."""

from __future__ import annotations

from collections.abc import Mapping

from sparsekit.errors import RecordError
from sparsekit.runs.directory import RunDirectory
from sparsekit.runs.schema import RunRecord, StepRecord
from sparsekit.runs.tracking import NullTracker


def begin(
    tracker: NullTracker,
    record: RunRecord,
    directory: RunDirectory,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Start the run in MLflow, or continue `run_id`: name, settings, and tags to search by."""
    found = {"task": record.task, "estimator": record.estimator, "key": record.key, **(tags or {})}
    found |= {f"plugin.{p['name']}": f"{p['distribution']} {p['version']}" for p in record.plugins}
    tracker.start(directory.path.name, record.settings, found, run_id)
    tracker.artifact(directory.path / "run.yaml")


def conclude(tracker: NullTracker, record: RunRecord, directory: RunDirectory) -> None:
    """Send the final figures, the weights and the mask."""
    final: dict[str, float] = {f"dense_{k}": v for k, v in record.dense.items()}
    if record.levels:
        last = record.levels[-1]
        final |= {"sparsity": last.achieved, "predicted_increase": last.predicted_increase}
        final |= {"measured_increase": last.measured_increase}
        final |= {f"pruned_{k}": v for k, v in last.pruned.items()}
        final |= {f"finetuned_{k}": v for k, v in (last.finetuned or {}).items()}
    final |= {f"seconds_{k}": v for k, v in record.seconds.items()}
    final["peak_memory_bytes"] = float(record.peak_memory_bytes)
    tracker.final(final)
    for name in ("weights.safetensors", "mask.safetensors"):
        tracker.artifact(directory.path / name)


def publish(
    tracker: NullTracker,
    directory: RunDirectory,
    tags: Mapping[str, str] | None = None,
    run_id: str | None = None,
) -> None:
    """Send a finished run from its directory; the result is as if it had been tracked while it ran.

    With `run_id`, an upload that was interrupted is continued.

    Raises:
        RecordError: its record cannot be read, or it is not finished.
    """
    record = directory.read()
    if record is None or record.status != "finished":
        raise RecordError(f"there is no finished run in '{directory.path}'; finish it first, with --resume")
    begin(tracker, record, directory, run_id, tags)
    tracker.metrics({f"dense/{k}": v for k, v in record.dense.items()}, step=0)
    for step in record.steps:
        tracker.metrics(step_metrics(step, record.parameters["prunable"]), step=step.index)
    conclude(tracker, record, directory)
    tracker.artifact(directory.record_path)
    tracker.finish("FINISHED")


def step_metrics(step: StepRecord, prunable: int) -> dict[str, float]:
    """MLflow's name -> figure of one step; `prunable` is the number of prunable weights."""
    out = {
        "sparsity": step.removed / prunable,
        "damping": step.damping,
        "predicted_increase": step.predicted_increase,
        "measured_increase": step.measured_increase,
        "removal/iterations": float(step.iterations),
        "removal/residual": step.residual,
    }
    for group in ("curvature", "pruned", "finetuned", "seconds"):
        out |= {f"{group}/{key}": value for key, value in (getattr(step, group) or {}).items()}
    if step.reconstruction is not None:
        out["reconstruction/increase"] = step.reconstruction.increase
        for fit in step.reconstruction.layers:
            out[f"reconstruction/error/{fit.name}"] = fit.error_after
    return out
