"""Tracking of runs in MLflow, which shows the records but does not replace them."""

from __future__ import annotations

import json
import math
import posixpath
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Literal

from sparsekit.runs import addresses
from sparsekit.runs.addresses import TrackingError
from sparsekit.runs.tracking_store import (
    client_of,
    default_uri,
    failures,
    first_line,
    initialise,
    mlflow_module,
    quiet,
    resolve_uri,
    sqlite_path,
    ui_command,
)

# The store's names stood here before it had a module of its own.
__all__ = ["NullTracker", "Tracker", "TrackingError", "default_uri", "initialise", "resolve_uri", "ui_command"]

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

# MLflow's limits, in characters.
_KEY_LENGTH, _PARAMETER_LENGTH, _TAG_LENGTH = 250, 6000, 5000

#: Largest number of seconds that a run waits for a server; files get one more second for each mebibyte.
PATIENCE = 20.0


class NullTracker:
    """A tracker that does nothing (`--no-tracking`), with the methods of `Tracker`.

    Attributes:
        run_id: MLflow's id of the run, after the start.
        failure: the first error, for the record's `degraded`.
    """

    run_id: str | None = None
    failure: str | None = None

    def start(
        self,
        run_name: str,
        parameters: Mapping[str, object],
        tags: Mapping[str, str],
        run_id: str | None = None,
    ) -> None:
        """Begin a run, or continue `run_id` if it still exists.

        Args:
            run_name: shown in the list of runs.
            parameters: nested settings; nesting becomes dots, lists JSON, and long values are cut.
            tags: searchable strings.
            run_id: of a run that was interrupted.
        """

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record figures at a step; those that are not finite become tags `nonfinite.<name>`, not numbers."""

    def final(self, values: Mapping[str, float]) -> None:
        """Record the final figures, under `final/`."""
        self.metrics({f"final/{name}": value for name, value in values.items()})

    def artifact(self, path: Path) -> None:
        """Store a file with the run."""

    def finish(self, status: RunStatus = "FINISHED") -> None:
        """End the run."""


class Tracker(NullTracker):
    """One run in MLflow. An error of MLflow does not stop the run: it becomes `failure`, and tracking stops."""

    def __init__(self, uri: str, experiment: str = "sparsekit", artifact_root: Path | None = None) -> None:
        self.uri = uri
        self.experiment = experiment
        self.artifact_root = artifact_root
        self._client: Any = None

    def start(
        self,
        run_name: str,
        parameters: Mapping[str, object],
        tags: Mapping[str, str],
        run_id: str | None = None,
    ) -> None:
        """See `NullTracker`; calls `initialise`, whose errors become `failure`."""

        def begin() -> None:
            initialise(self.uri, self.experiment, self.artifact_root)
            self._client = client_of(self.uri)
            labels = {"mlflow.source.name": "sparsekit", **tags}
            if run_id is not None and self._exists(run_id):
                self._client.update_run(run_id, status="RUNNING")
                self.run_id = run_id
                # Not the parameters: MLflow refuses to change one, and the output folder may have moved.
                self._log(tags=labels)
                return
            experiment = self._client.get_experiment_by_name(self.experiment)
            self.run_id = self._client.create_run(experiment.experiment_id, run_name=run_name).info.run_id
            self._log(parameters=_flat(parameters), tags=labels)

        self._attempt("starting the run", begin)

    def find(self, tags: Mapping[str, str], finished: bool = False) -> str | None:
        """MLflow's id of the latest run with these tags, or None; `finished`: only among finished runs."""
        found: list[str] = []

        def look() -> None:
            initialise(self.uri, self.experiment, self.artifact_root)
            client = client_of(self.uri)
            experiment = client.get_experiment_by_name(self.experiment).experiment_id
            asked = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
            asked += ["attributes.status = 'FINISHED'"] if finished else []
            found.extend(r.info.run_id for r in client.search_runs([experiment], " and ".join(asked), max_results=1))

        self._attempt("looking for the run", look)
        return found[0] if found else None

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record figures at a step; those that are not finite become tags `nonfinite.<name>`, not numbers."""
        # MLflow stores infinity as 1.797e308, which would spoil plots.
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        others = {f"nonfinite.{name}": str(float(values[name])) for name in values if name not in finite}
        self._attempt("logging metrics", lambda: self._log(metrics=finite, tags=others, step=step))

    def artifact(self, path: Path) -> None:
        """Store a file with the run."""
        size = path.stat().st_size if path.exists() else 0
        keep = PATIENCE + size / 2**20
        self._attempt("storing an artifact", lambda: self._client.log_artifact(self.run_id, str(path)), keep)

    def finish(self, status: RunStatus = "FINISHED") -> None:
        """End the run."""
        self._attempt("ending the run", lambda: self._client.set_terminated(self.run_id, status))

    def _exists(self, run_id: str) -> bool:
        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except mlflow_module().exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _attempt(self, what: str, action: Callable[[], None], patience: float | None = None) -> None:
        if self.failure is not None:
            return
        mlflow_module()  # importing takes seconds, which must not count as the server's
        try:
            with quiet():
                if sqlite_path(self.uri) is None:
                    _bounded(action, PATIENCE if patience is None else patience)
                else:
                    action()  # SQLite has its own timeout
        except failures(TrackingError) as error:
            said = addresses.without_secrets(first_line(error), self.uri)
            self.failure = f"tracking stopped while {what}: {said}"

    def _log(
        self,
        metrics: Mapping[str, float] | None = None,
        parameters: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        step: int | None = None,
    ) -> None:
        of, now = mlflow_module().entities, int(time.time() * 1000)
        points = [of.Metric(_name(name), value, now, step or 0) for name, value in (metrics or {}).items()]
        params = [of.Param(_name(n), _short(v, _PARAMETER_LENGTH)) for n, v in (parameters or {}).items()]
        labels = [of.RunTag(_name(name), _short(value, _TAG_LENGTH)) for name, value in (tags or {}).items()]
        self._client.log_batch(self.run_id, points, params, labels)  # in as many requests as MLflow's limits ask for


def _bounded(action: Callable[[], None], seconds: float) -> None:
    """Run the action in a thread, which is abandoned if it takes longer.

    Raises:
        TrackingError: it takes longer.
    """
    done: Future[None] = Future()

    def work() -> None:
        try:
            action()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    if not wait([done], seconds).done:
        raise TrackingError(f"MLflow has not answered for {seconds:.0f} s")
    done.result()


def _flat(parameters: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in parameters.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            flat[f"{prefix}{key}"] = text
    return flat


def _name(name: str) -> str:
    """A name that MLflow accepts: allowed characters, and a relative path without `..`."""
    cleaned = re.sub(r"[^A-Za-z0-9_\-.: /]", "_", name)
    if posixpath.normpath(cleaned) != cleaned or cleaned.startswith(("/", ".")):
        cleaned = "/".join(part for part in cleaned.split("/") if part.strip(".")) or "_"
    return cleaned[:_KEY_LENGTH].rstrip("/")


def _short(value: str, length: int) -> str:
    return value if len(value) <= length else value[: length - 1] + "…"
