"""Where MLflow keeps runs: its address, made ready before it is used. The only file that imports mlflow."""

from __future__ import annotations

import logging
import os
import shlex
import sqlite3
import urllib.error
import urllib.request
import uuid
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from filelock import FileLock, Timeout

from sparsekit.runs import addresses
from sparsekit.runs.addresses import TrackingError

# Set before mlflow is imported, unless the user has set them: an offline tool sends no telemetry, and a
# server that is gone must not delay a run for ten minutes.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


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
    path = sqlite_path(uri)
    if uri.startswith(("http://", "https://")):
        _check_server(uri)
    with quiet(), _explained(uri):
        if path is None:
            _ensure_experiment(uri, experiment, None)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock"), timeout=60):
            if not path.exists():
                _make_database(path)
            _check_database(path)
            _ensure_experiment(uri, experiment, (artifact_root or path.parent / "mlartifacts").resolve())


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite address; None for every other address."""
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
    client_of(default_uri(path.parent).rpartition("/")[0] + "/" + quote(beside.name)).search_experiments()
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
    except failures(Timeout, sqlite3.Error, ImportError) as error:
        said = addresses.without_secrets(first_line(error), uri)
        raise TrackingError(
            f"MLflow cannot track runs at {addresses.redacted(uri)}: {said}; give another --tracking-uri, or run with "
            "--no-tracking"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of what the database said, else of what mlflow said."""
    # SQLAlchemy wraps the database's message in several of its own, and mlflow wraps those.
    own = getattr(error, "orig", None) or getattr(error.__cause__, "orig", None) or error
    return (str(own).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Mlflow and SQLAlchemy neither log nor warn inside."""
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


def mlflow_module() -> Any:
    """Import mlflow; all uses go through here, so that its environment is set before the import."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow.tracking

    return mlflow


def failures(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """The exceptions of mlflow when its store fails, and `others`; not those of our own bugs."""
    failure: type[Exception] = mlflow_module().exceptions.MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (failure, SQLAlchemyError, OSError, *others)  # requests' exceptions are OSErrors


def client_of(uri: str) -> Any:
    """A client of this URI only: MLflow's global state is never set."""
    with quiet():  # the first client imports the models that warn
        return mlflow_module().MlflowClient(tracking_uri=uri)


def _ensure_experiment(uri: str, name: str, artifact_root: Path | None) -> str:
    client = client_of(uri)
    found = client.get_experiment_by_name(name)
    if found is None:
        location = None if artifact_root is None else artifact_root.as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except mlflow_module().exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another run has created it meanwhile
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"the MLflow experiment '{name}' at {addresses.redacted(uri)} was deleted; restore it with "
            f"'mlflow experiments restore --experiment-id {found.experiment_id}', or track elsewhere"
        )
    return str(found.experiment_id)
