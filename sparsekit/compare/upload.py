"""Upload of finished runs to MLflow from their records; a comparison's runs have one parent run."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Sequence
from pathlib import Path

from sparsekit.compare.plan import PLAN, Comparison
from sparsekit.errors import RecordError
from sparsekit.runs.addresses import TrackingError
from sparsekit.runs.directory import RunDirectory
from sparsekit.runs.publish import publish
from sparsekit.runs.tracking import Tracker

#: MLflow's tag for a run's parent.
PARENT = "mlflow.parentRunId"


class Upload:
    """Uploads the runs that MLflow does not have yet.

    Args:
        uri, experiment: of MLflow.
        directory: of a comparison, whose parent run is begun or continued; None for runs without a comparison.
        name: of the parent run.

    Attributes:
        failure: the first error of MLflow; nothing is uploaded after it.
        skipped: why a run could not be read, the first such error.
        told: number of uploaded runs.
    """

    def __init__(self, uri: str, experiment: str, directory: Path | None = None, name: str = "") -> None:
        self._uri, self._experiment, self._directory = uri, experiment, directory
        self.failure: str | None = None
        self.skipped: str | None = None
        self.told = 0
        self._parent: Tracker | None = None
        if directory is not None:
            place = str(directory.resolve())
            key = {"comparison": hashlib.sha256(place.encode()).hexdigest()[:16]}
            self._parent = Tracker(uri, experiment)
            self._parent.start(name, {}, {**key, "directory": place}, self._parent.find(key))
            self.failure = self._parent.failure

    def run(self, path: Path) -> None:
        """Upload a finished run, unless MLflow has it already."""
        if self.failure is not None:
            return
        tags = {} if self._parent is None else {PARENT: self._parent.run_id or ""}
        directory, child = RunDirectory(path), Tracker(self._uri, self._experiment)
        try:
            record = directory.read()
            if record is not None and child.find({"key": record.key, **tags}, finished=True) is None:
                begun = child.find({"key": record.key, **tags})  # an upload that was interrupted
                publish(child, directory, tags, begun)
                self.told += child.failure is None
        except RecordError as error:
            self.skipped = self.skipped or str(error)  # a damaged record; the other runs are uploaded
        self.failure = child.failure

    def finish(self, files: Sequence[Path]) -> None:
        """End the parent run, with the plan and the report's files."""
        if self._parent is not None and self._directory is not None:
            for path in (self._directory / PLAN, *files):
                self._parent.artifact(path)
            self._parent.finish()
            self.failure = self.failure or self._parent.failure


class Uploader:
    """An `Upload` in a thread of its own, so that runs never wait for a slow or unreachable MLflow."""

    def __init__(self, uri: str, experiment: str, directory: Path, name: str) -> None:
        self._where = uri, experiment, directory, name
        self._queue: queue.SimpleQueue[Path | Sequence[Path]] = queue.SimpleQueue()
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(self, path: Path) -> None:
        """Queue a finished run."""
        self._queue.put(path)

    def close(self, files: Sequence[Path], timeout: float = 120.0) -> str | None:
        """Upload all queued runs, and end the parent run with these files; returns the first error."""
        self._queue.put(files)
        self._thread.join(timeout)
        return f"MLflow has not answered for {timeout:.0f} s" if self._thread.is_alive() else self.failure

    def _work(self) -> None:
        self.failure = "the thread that tells MLflow has ended"  # unless it gets to its end
        upload = Upload(*self._where)
        while isinstance(item := self._queue.get(), Path):
            upload.run(item)
        upload.finish(item)
        self.failure = upload.failure or upload.skipped


def track(directory: Path, uri: str, experiment: str) -> tuple[int, int]:
    """Upload all finished runs of a directory that MLflow does not have yet.

    Args:
        directory: of a comparison, of runs, or of one run.
        uri: of MLflow.
        experiment: its name.

    Returns:
        The number of runs uploaded now, and of all finished ones.

    Raises:
        RecordError: there are no finished runs, or a record is damaged.
        TrackingError: MLflow cannot be reached, or fails.
    """
    if (directory / PLAN).exists():
        comparison = Comparison.load(directory)
        paths = [directory / run.directory for run in comparison.plan.runs]
        upload, files = Upload(uri, experiment, directory, comparison.plan.name), [*(directory / "report").glob("*")]
    else:
        alone = (directory / "record.json").exists()
        paths = [directory] if alone else sorted(path.parent for path in directory.glob("*/record.json"))
        upload, files = Upload(uri, experiment), []
    finished = [path for path in paths if _finished(path)]
    if not finished:
        raise RecordError(
            f"there are no finished runs in '{directory}'; give the directory of a comparison, of runs or of one run"
        )
    for path in finished:
        upload.run(path)
    upload.finish(sorted(files))
    if upload.failure is not None:
        raise TrackingError(upload.failure)
    if upload.skipped is not None:
        raise RecordError(upload.skipped)
    return upload.told, len(finished)


def _finished(path: Path) -> bool:
    """Whether a run is finished; also True where its record cannot be read, so that the error is reported."""
    try:
        record = RunDirectory(path).read()
    except RecordError:
        return True
    return record is not None and record.status == "finished"
