"""A run as MLflow shows it: a view of the record, never the truth. The only file that imports mlflow."""

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

# MLflow's own limits, in characters and in entries a request.
_KEY_LENGTH, _PARAMETER_LENGTH, _TAG_LENGTH = 250, 6000, 5000
_METRICS_A_BATCH, _OTHERS_A_BATCH = 1000, 100

# Set before mlflow is imported, and only where the user has not: an offline tool sends no telemetry, and a
# server that has gone away may hold up a run for a minute, not for ten.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


#: Seconds that a run waits at most for a server that hangs; files are allowed a mebibyte a second on top.
PATIENCE = 20.0


def default_uri(output: Path) -> str:
    """The SQLite file `mlflow.db` in the output folder, as an absolute URI."""
    # SQLAlchemy reads the path percent-decoded, and takes what follows a '?' for options.
    return "sqlite:///" + quote((Path(output).resolve() / "mlflow.db").as_posix())


def resolve_uri(explicit: str | None, output: Path) -> str:
    """Where to track: what was asked for, else `MLFLOW_TRACKING_URI`, else `default_uri`.

    Raises:
        TrackingError: it can be no address; whether somebody answers there is not asked.
    """
    uri = explicit or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(output)
    addresses.check(uri)
    return uri


def ui_command(uri: str) -> str:
    """The command that shows the runs in a browser; the address itself where a server already does."""
    if uri.startswith(("http://", "https://")):
        return addresses.redacted(uri)
    return f"mlflow ui --backend-store-uri {shlex.quote(addresses.redacted(uri))}"


def initialise(uri: str, experiment: str = "sparsekit", artifact_root: Path | None = None) -> None:
    """Make the tracking place ready, once, however many runs ask for it at the same time.

    Args:
        uri: SQLite file, server or other database. A SQLite file and its folder are created.
        experiment: created where it does not exist.
        artifact_root: where a new experiment in a SQLite file keeps its artifacts; `mlartifacts` beside the
            file unless given. Elsewhere the server decides.

    Raises:
        TrackingError: the place cannot be reached, or is not one.
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
    # MLflow's client would try for minutes; any answer at all means that somebody is there.
    parts = urlsplit(uri)  # credentials and queries are MLflow's: urllib would take them for parts of the host or path
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
    """MLflow's tables, made under another name: a kill while they are leaves no half a database in the way."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")  # MLflow knows a store by its address
    for stale in path.parent.glob(f".{path.name}.*.new*"):  # of one that was killed, with its journal
        stale.unlink()
    _client(default_uri(path.parent).rpartition("/")[0] + "/" + quote(beside.name)).search_experiments()
    with closing(sqlite3.connect(beside)) as connection:  # all of it in the one file
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.replace(beside, path)


def _check_database(path: Path) -> None:
    # MLflow's client retries for 100 seconds on a file that cannot be opened; SQLite itself says so at once.
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
    # SQLAlchemy wraps the database's own sentence in several of its own, and mlflow wraps those.
    own = getattr(error, "orig", None) or getattr(error.__cause__, "orig", None) or error
    return (str(own).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    # MLflow logs a page of traceback for a failure that it then raises, and that we report in a sentence.
    logger = logging.getLogger("mlflow.store.db.utils")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # mlflow 3.17 on SQLAlchemy 2.1: a loader strategy of theirs is deprecated, nothing of ours.
            warnings.filterwarnings("ignore", "The ``noload`` loader strategy", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def _mlflow() -> Any:
    """The one door to mlflow, so that it is never imported before its environment is set."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow.tracking

    return mlflow


def _failures(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """What mlflow raises when its store fails, and `others`; not what a mistake of ours raises."""
    failure: type[Exception] = _mlflow().exceptions.MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (failure, SQLAlchemyError, OSError, *others)  # requests' exceptions are OSErrors


def _client(uri: str) -> Any:
    """A client of this URI alone: MLflow's global state is never set."""
    with _quiet():  # the first client imports the models that warn
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
            found = client.get_experiment_by_name(name)  # another run on the server was first
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"the MLflow experiment '{name}' at {addresses.redacted(uri)} was deleted; restore it with "
            f"'mlflow experiments restore --experiment-id {found.experiment_id}', or track elsewhere"
        )
    return str(found.experiment_id)


class NullTracker:
    """Tracks nothing (`--no-tracking`); what a run tells `Tracker` about itself, it may tell this.

    Attributes:
        run_id: MLflow's name for the run, once it has started.
        failure: the first thing that went wrong; it belongs into the record's `degraded`.
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
        """Begin a run, or go on with `run_id` where it still exists.

        Args:
            run_name: shown in the list of runs.
            parameters: nested settings; nesting becomes dots, lists JSON, and what is too long is cut.
            tags: searchable strings.
            run_id: of a run that was interrupted.
        """

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Figures at a step; those that are not finite become tags `nonfinite.<name>`, not numbers."""

    def final(self, values: Mapping[str, float]) -> None:
        """The figures that count, under `final/`."""
        self.metrics({f"final/{name}": value for name, value in values.items()})

    def artifact(self, path: Path) -> None:
        """Keep a file with the run."""

    def finish(self, status: RunStatus = "FINISHED") -> None:
        """End the run."""


class Tracker(NullTracker):
    """One run in MLflow. A failure of MLflow never becomes one of the run: it is kept, and tracking stops."""

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
        """MLflow's name for the latest run with these tags, or None; `finished`: among those that are."""
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
        """Figures at a step; those that are not finite become tags `nonfinite.<name>`, not numbers."""
        # MLflow stores infinity as 1.797e308: a plot of it would be wrong, silence too.
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        others = {f"nonfinite.{name}": str(float(values[name])) for name in values if name not in finite}
        self._attempt("logging metrics", lambda: self._log(metrics=finite, tags=others, step=step))

    def artifact(self, path: Path) -> None:
        """Keep a file with the run."""
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
        _mlflow()  # importing it takes seconds, which are not the server's
        try:
            with _quiet():
                if _sqlite_path(self.uri) is None:
                    _bounded(action, PATIENCE if patience is None else patience)
                else:
                    action()  # has bounds of its own
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
    """Do it in a thread of its own, which is left behind where it takes longer.

    Raises:
        TrackingError: it does.
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
    """A name that MLflow takes: its characters, and a relative path that goes nowhere else."""
    cleaned = re.sub(r"[^A-Za-z0-9_\-.: /]", "_", name)
    if posixpath.normpath(cleaned) != cleaned or cleaned.startswith(("/", ".")):
        cleaned = "/".join(part for part in cleaned.split("/") if part.strip(".")) or "_"
    return cleaned[:_KEY_LENGTH].rstrip("/")


def _short(value: str, length: int) -> str:
    return value if len(value) <= length else value[: length - 1] + "…"
