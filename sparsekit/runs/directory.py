"""A run's directory: its record, settings, weights and mask, and checkpoints while it runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor

from sparsekit import checksums
from sparsekit.errors import DamagedError, RecordError
from sparsekit.files import atomic_write, remove_folder, reported, write_tensors
from sparsekit.problem.parameters import ParameterSpace
from sparsekit.runs.checkpoints import Checkpoints
from sparsekit.runs.schema import SCHEMA_VERSION, RunRecord, plain

#: The files of a finished run beside its record.
RESULTS = ("run.yaml", "mask.safetensors", "weights.safetensors")

#: The metadata of every mask file: the meaning of True in its tensors.
MASK_METADATA = {"format": "pt", "meaning": "True = kept"}


def _check_kept(kept: Mapping[str, Tensor], space: ParameterSpace, source: str) -> None:
    if set(kept) != set(space.names):
        odd = sorted(set(kept) ^ set(space.names))
        raise RecordError(f"{source} is not of these parameters; only one of the two has: {', '.join(odd)}")
    for info in space.parameters:
        tensor = kept[info.name]
        if tuple(tensor.shape) != info.shape or tensor.dtype != torch.bool:
            raise RecordError(
                f"{source}: '{info.name}' is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                f"torch.bool of shape {info.shape} was needed"
            )


class RunDirectory:
    """The folder of one run, `root/<task>-<estimator>-<key[:12]>`, and the files in it.

    Each file is written under a temporary name and renamed, so that readers see only whole files.

    Attributes:
        path: the folder; created with the first file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Not in the folder, so that --fresh can remove the folder while it holds the lock.
        self._lock_path = path.parent / ".locks" / f"{path.name}.lock"
        self.checkpoints = Checkpoints(path / "checkpoint")

    @classmethod
    def of(cls, root: Path, task: str, estimator: str, key: str) -> RunDirectory:
        """The folder that a run has under `root`."""
        return cls(Path(root) / f"{task}-{estimator}-{key[:12]}")

    def copied(self, folder: Path) -> RunDirectory:
        """A copy of the run, as far as there is one, in another folder."""
        if self.path.exists():
            shutil.copytree(self.path, folder / self.path.name)
        return RunDirectory(folder / self.path.name)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run for this process.

        Raises:
            RecordError: another process has locked it.
        """
        lock = FileLock(self._lock_path)
        with reported("lock", self._lock_path):
            self._lock_path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise RecordError(
                    f"another process is working on this run ({self.path}); wait for it to finish, or stop it"
                ) from error
        try:
            for stray in (
                *self.path.glob(".*.tmp"),
                *self.path.glob(".tmp*"),
            ):  # from a process that was killed while writing
                with suppress(OSError):
                    stray.unlink()
            yield
        finally:
            lock.release()

    @property
    def record_path(self) -> Path:
        """`record.json`."""
        return self.path / "record.json"

    def read(self) -> RunRecord | None:
        """The record, or None where there is none.

        Raises:
            DamagedError: it is not a whole record.
            RecordError: it cannot be read, or is of another schema version.
        """
        try:
            content = self.record_path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RecordError(f"cannot read {self.record_path}: {error.strerror}") from error
        try:
            text = checksums.unsealed(content)
            version = json.loads(text)["schema_version"]
            record = RunRecord.model_validate_json(text) if version == SCHEMA_VERSION else None
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(
                f"{self.record_path} is not a whole record ({type(error).__name__}); "
                f"start the run again with --fresh, or remove {self.path}"
            ) from error
        if record is None:
            raise RecordError(
                f"{self.record_path} has schema version {version}, this sparsekit reads {SCHEMA_VERSION}; "
                "use the sparsekit that wrote it, or start the run again with --fresh"
            )
        return record

    def write(self, record: RunRecord) -> None:
        """Write `record.json` atomically."""
        atomic_write(self.record_path, checksums.sealed(record.model_dump_json()))

    def results(self) -> dict[str, str]:
        """File name -> checksum of the existing files of a finished run beside its record."""
        paths = [self.path / name for name in RESULTS]
        with reported("read", self.path):
            return {path.name: checksums.of_file(path) for path in paths if path.exists()}

    def check_results(self, record: RunRecord) -> None:
        """Refuse a finished run whose files have changed.

        Raises:
            DamagedError: a file is missing or changed.
        """
        found = self.results()
        for name, checksum in record.files.items():
            if found.get(name) != checksum:
                what = "is gone" if name not in found else "is not what the run wrote"
                raise DamagedError(f"{self.path / name} {what}; do the run again with --fresh")

    def write_settings(self, settings: Mapping[str, object]) -> None:
        """Write `run.yaml`: the settings, with which the run can be repeated."""
        text = yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True)
        atomic_write(self.path / "run.yaml", text.encode())

    def write_result(self, space: ParameterSpace, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
        """Write `weights.safetensors` and `mask.safetensors`.

        Args:
            space: the prunable parameters.
            weights: the model's whole state_dict.
            kept: for each parameter of the space a bool tensor of its shape, True = kept.
        """
        _check_kept(kept, space, "the mask")
        write_tensors(self.path / "mask.safetensors", kept, MASK_METADATA)
        write_tensors(self.path / "weights.safetensors", weights, {"format": "pt"})

    def discard(self) -> None:
        """Remove the run's folder with its contents, the record first: it must not describe missing files."""
        self.checkpoints.forget()
        with reported("remove", self.record_path):
            self.record_path.unlink(missing_ok=True)
        remove_folder(self.path)
