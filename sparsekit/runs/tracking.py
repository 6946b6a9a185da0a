"""Tracking of runs in MLflow, which shows the records but does not replace them. Only this file imports mlflow."""

from __future__ import annotations

import json
import logging
import math
import os
import posixpath
import re
import shlex
import sqlite3
import threading
import time
import urllib.error
import urllib.request
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit

from filelock import FileLock, Timeout

from sparsekit.runs import addresses
from sparsekit.runs.addresses import TrackingError

__all__ = ["NullTracker", "Tracker", "TrackingError", "default_uri", "initialise", "resolve_uri", "ui_command"]

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

# MLflow's limits, in characters and in entries of a request.
_KEY_LENGTH, _PARAMETER_LENGTH, _TAG_LENGTH = 250, 6000, 5000
_METRICS_A_BATCH, _OTHERS_A_BATCH = 1000, 100

# Set before mlflow is imported, unless the user has set them: an offline tool sends no telemetry, and a
# server that is gone must not delay a run for ten minutes.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


#: Largest number of seconds that a run waits for a server; files get one more second for each mebibyte.
PATIENCE = 20.0


def default_uri(output: Path) -> str:
    """The SQLite file `mlflow.db` in the output folder, as an absolute URI."""
    # SQLAlchemy decodes percent signs in the path, and reads what follows a '?' as options.
    return "sqlite:///" + quote((Path(output).resolve() / "mlflow.db").as_posix())


def resolve_uri(explicit: str | None, output: Path) -> str:
    """MLflow's address: the given one, else `MLFLOW_TRACKING_URI`, else `default_uri`.

    Raises:
        TrackingError: it is not a valid address; whether a server answers is not checked.
    """
    uri = explicit or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(output)
    addresses.check(uri)
    return uri


def ui_command(uri: str) -> str:
    """The command that shows the runs in a browser; for a server its address."""
    if uri.startswith(("http://", "https://")):
        return addresses.redacted(uri)
    return f"mlflow ui --backend-store-uri {shlex.quote(addresses.redacted(uri))}"


def initialise(uri: str, experiment: str = "sparsekit", artifact_root: Path | None = None) -> None:
    """Create the database and the experiment if they do not exist; safe if several runs do it at the same time.

    Args:
        uri: SQLite file, server or other database. A SQLite file and its folder are created.
        experiment: created if it does not exist.
        artifact_root: folder for the artifacts of a new experiment in a SQLite file; by default `mlartifacts` beside
            the file. Otherwise the server decides.

    Raises:
        TrackingError: the address cannot be reached, or is not a tracking store.
    """
    path = _sqlite_path(uri)
    if uri.startswith(("http://", "https://")):
        _check_server(uri)
    with _quiet(), _explained(uri):
        if path is None:
            _ensure_experiment(uri, experiment, None)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock"), timeout=60):
            if not path.exists():
                _make_database(path)
            _check_database(path)
            _ensure_experiment(uri, experiment, (artifact_root or path.parent / "mlartifacts").resolve())


def _sqlite_path(uri: str) -> Path | None:
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0])).absolute()


def _check_server(uri: str) -> None:
    # MLflow's client would retry for minutes; any answer means that a server is there.
    parts = urlsplit(uri)  # credentials and queries are for MLflow: urllib would read them as parts of host or path
    place = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    try:
        urllib.request.urlopen(place.rstrip("/") + "/health", timeout=10).close()
    except urllib.error.HTTPError as answer:
        answer.close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TrackingError(
            f"no MLflow server answers at {addresses.redacted(uri)} ({reason}); start it, give another --tracking-uri, "
            "or run with --no-tracking"
        ) from error


def _make_database(path: Path) -> None:
    """Create MLflow's tables under another name, so that a killed process leaves no incomplete database."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")  # a new name: MLflow caches stores by address
    for stale in path.parent.glob(f".{path.name}.*.new*"):  # from a killed process, with its journal
        stale.unlink()
    _client(default_uri(path.parent).rpartition("/")[0] + "/" + quote(beside.name)).search_experiments()
    with closing(sqlite3.connect(beside)) as connection:  # moves the journal into the file
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.replace(beside, path)


def _check_database(path: Path) -> None:
    # MLflow's client retries for 100 seconds on a file that cannot be opened; SQLite raises at once.
    with closing(sqlite3.connect(path, timeout=30)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("SELECT count(*) FROM sqlite_master")


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    try:
        yield
    except TrackingError:
        raise
    except _failures(Timeout, sqlite3.Error, ImportError) as error:
        said = addresses.without_secrets(_first_line(error), uri)
        raise TrackingError(
            f"MLflow cannot track runs at {addresses.redacted(uri)}: {said}; give another --tracking-uri, or run with "
            "--no-tracking"
        ) from error


def _first_line(error: BaseException) -> str:
    # SQLAlchemy wraps the database's message in several of its own, and mlflow wraps those.
    own = getattr(error, "orig", None) or getattr(error.__cause__, "orig", None) or error
    return (str(own).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    # MLflow logs a long traceback for an error that it also raises, and that we report in one sentence.
    logger = logging.getLogger("mlflow.store.db.utils")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # mlflow 3.17 with SQLAlchemy 2.1 uses a deprecated loader strategy.
            warnings.filterwarnings("ignore", "The ``noload`` loader strategy", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def _mlflow() -> Any:
    """Import mlflow; all uses go through here, so that its environment is set before the import."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow.tracking

    return mlflow


def _failures(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """The exceptions of mlflow when its store fails, and `others`; not those of our own bugs."""
    failure: type[Exception] = _mlflow().exceptions.MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (failure, SQLAlchemyError, OSError, *others)  # requests' exceptions are OSErrors


def _client(uri: str) -> Any:
    """A client of this URI only; MLflow's global state is never set."""
    with _quiet():  # the first client imports models that warn
        return _mlflow().MlflowClient(tracking_uri=uri)


def _ensure_experiment(uri: str, name: str, artifact_root: Path | None) -> str:
    client = _client(uri)
    found = client.get_experiment_by_name(name)
    if found is None:
        location = None if artifact_root is None else artifact_root.as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except _mlflow().exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another run has created it meanwhile
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"the MLflow experiment '{name}' at {addresses.redacted(uri)} was deleted; restore it with "
            f"'mlflow experiments restore --experiment-id {found.experiment_id}', or track elsewhere"
        )
    return str(found.experiment_id)


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
        parameters: Mapping[str, Any],
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
        parameters: Mapping[str, Any],
        tags: Mapping[str, str],
        run_id: str | None = None,
    ) -> None:
        """See `NullTracker`; calls `initialise`, whose errors become `failure`."""

        def begin() -> None:
            initialise(self.uri, self.experiment, self.artifact_root)
            self._client = _client(self.uri)
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
            client = _client(self.uri)
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
        except _mlflow().exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _attempt(self, what: str, action: Callable[[], None], patience: float | None = None) -> None:
        if self.failure is not None:
            return
        _mlflow()  # importing takes seconds, which must not count as the server's
        try:
            with _quiet():
                if _sqlite_path(self.uri) is None:
                    _bounded(action, PATIENCE if patience is None else patience)
                else:
                    action()  # SQLite has its own timeout
        except _failures(TrackingError) as error:
            said = addresses.without_secrets(_first_line(error), self.uri)
            self.failure = f"tracking stopped while {what}: {said}"

    def _log(
        self,
        metrics: Mapping[str, float] | None = None,
        parameters: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        step: int | None = None,
    ) -> None:
        of, now = _mlflow().entities, int(time.time() * 1000)
        points = [of.Metric(_name(name), value, now, step or 0) for name, value in (metrics or {}).items()]
        params = [of.Param(_name(n), _short(v, _PARAMETER_LENGTH)) for n, v in (parameters or {}).items()]
        labels = [of.RunTag(_name(name), _short(value, _TAG_LENGTH)) for name, value in (tags or {}).items()]
        for start in range(0, len(points), _METRICS_A_BATCH):
            self._client.log_batch(self.run_id, metrics=points[start : start + _METRICS_A_BATCH])
        for start in range(0, max(len(params), len(labels)), _OTHERS_A_BATCH):
            part = slice(start, start + _OTHERS_A_BATCH)
            self._client.log_batch(self.run_id, params=params[part], tags=labels[part])


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


def _flat(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
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
