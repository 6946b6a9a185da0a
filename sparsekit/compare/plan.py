"""A comparison on disk: its plan, records, failures and tuning, from which the report is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsekit.errors import RecordError
from sparsekit.files import atomic_write
from sparsekit.runs.directory import RunDirectory
from sparsekit.runs.schema import RunRecord

#: Files and folders of a comparison's directory.
PLAN, TUNING, RUNS, FAILURES, TRIALS = "plan.json", "tuning.json", "runs", "failures", "trials"

T = TypeVar("T", bound=BaseModel)


class _Schema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class PlannedRun(_Schema):
    """One point of the comparison with one seed."""

    axes: dict[str, str] = Field(
        description="what it is: always task, method, compensation, reconstruction, pattern and schedule, then the "
        "comparison's own axes"
    )
    seed: int
    directory: str = Field(description="of its record, relative to the comparison's directory")
    settings: dict[str, object] = Field(description="of the run, as `sparsekit run --config` reads them")
    departures: dict[str, object] = Field(
        default_factory=dict, description="settings that differ from the estimator's (or preset's) own defaults"
    )
    memory_bytes: int = Field(default=0, description="what its worker is expected to need at most")
    lost: str = Field(default="", description="why it cannot be done: the search for its damping has failed")


class Plan(_Schema):
    """`plan.json`: everything that was to be run, and under which protocol."""

    name: str
    file: dict[str, object] = Field(description="the comparison's file, with what the command line changed")
    reference: str | None = Field(description="the method that others are compared with, seed by seed")
    warnings: list[str] = Field(description="where the file departs from the protocol, a sentence each")
    seeds_vary: list[str] = Field(description="what differs between two seeds of one point")
    seeds_share: list[str] = Field(description="what does not")
    judged: dict[str, int] = Field(default_factory=dict, description="task -> examples that metrics are means over")
    multiply_adds: dict[str, dict[str, float]] = Field(
        description="task -> parameter -> multiply-adds of one example's forward pass, dense"
    )
    runs: list[PlannedRun]


class Trial(_Schema):
    """One damping tried on the tuning half."""

    damping: float = Field(description="in units of the mean of diag F")
    value: float = Field(description="what is maximised; -inf: the run failed")
    cause: str = Field(default="", description="why it failed")


class Tuned(_Schema):
    """The result of tuning for one method and one value of each axis."""

    axes: dict[str, str]
    trials: list[Trial]
    damping: float | None = Field(description="chosen, in units of the mean of diag F; null: no trial succeeded")


class Tuning(_Schema):
    """`tuning.json`."""

    key: str = Field(default="", description="hash of what was searched: another one is searched anew")
    objective: str = Field(description="what was maximised, in words")
    tuned: list[Tuned]
    untuned: list[str] = Field(description="methods that have no damping to tune")


class Failure(_Schema):
    """Why a run did not finish, in `failures/<directory's name>.json`."""

    cause: str = Field(description="one sentence, or a bug's last line")
    details: str = Field(default="", description="a bug's traceback")
    when: str = Field(description="ISO 8601, UTC")


@dataclass(frozen=True)
class Comparison:
    """The contents of a comparison's directory.

    Attributes:
        directory: of the comparison.
        plan: see `Plan`.
        records: directory of a planned run -> its record; absent where the run has not begun.
        failures: directory of a planned run -> why it failed; a run neither finished nor failed is still to be done.
        tuning: None where nothing is tuned.
    """

    directory: Path
    plan: Plan
    records: Mapping[str, RunRecord]
    failures: Mapping[str, Failure]
    tuning: Tuning | None

    @classmethod
    def load(cls, directory: Path) -> Comparison:
        """Read a comparison.

        Raises:
            RecordError: there is no plan, or a file is damaged; a damaged run record becomes that run's failure.
        """
        plan = read(Plan, directory / PLAN)
        if plan is None:
            raise RecordError(f"there is no comparison in '{directory}' (no {PLAN}); give a directory of one")
        records: dict[str, RunRecord] = {}
        failures: dict[str, Failure] = {}
        for run in plan.runs:
            if run.lost:  # a record there would be of another damping
                failures[run.directory] = Failure(cause=run.lost, when="")
                continue
            try:
                found = read(Failure, directory / FAILURES / f"{Path(run.directory).name}.json")
                record = RunDirectory(directory / run.directory).read()
            except RecordError as error:
                failures[run.directory] = Failure(cause=str(error), when="")
                continue
            if record is not None:
                records[run.directory] = record
            if found is not None and (record is None or record.status != "finished"):
                failures[run.directory] = found
        return cls(directory, plan, records, failures, read(Tuning, directory / TUNING))

    def finished(self, run: PlannedRun) -> bool:
        """Whether a run is finished."""
        record = self.records.get(run.directory)
        return record is not None and record.status == "finished"


def read(model: type[T], path: Path) -> T | None:
    """A file of one of the models above, None where there is none.

    Raises:
        RecordError: it is damaged, or of another version.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{error.error_count()} of its fields are not valid"
        raise RecordError(
            f"'{path}' cannot be read: {reason}; remove it, and 'sparsekit compare' with the comparison's file makes "
            "it again"
        ) from error


def write(model: BaseModel, path: Path) -> None:
    """Write a model's file atomically."""
    atomic_write(path, model.model_dump_json(indent=2).encode() + b"\n")
