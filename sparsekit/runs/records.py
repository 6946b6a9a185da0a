"""What a run leaves on disk: its record, settings, weights and mask, and checkpoints while it runs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsekit.errors import DamagedError, RecordError
from sparsekit.problem.parameters import ParameterSpace
from sparsekit.runs import checksums

#: Raised whenever a field below changes its name, meaning or unit; part of every run's identity.
SCHEMA_VERSION = 1

#: Bytes of a tensor from which on a checkpoint looks whether it is on disk already: gradient rows take gigabytes.
LARGE = 1 << 20

#: The files that a finished run leaves beside its record.
RESULTS = ("run.yaml", "mask.safetensors", "weights.safetensors")

#: Of every file of a mask: what True in its tensors means.
MASK_METADATA = {"format": "pt", "meaning": "True = kept"}


class _Schema(BaseModel):
    # Strict JSON has no infinity: it is written as the string "Infinity" and read back as a float.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class LayerFitRecord(_Schema):
    """How a layer was fitted to what it gives in the dense network."""

    name: str = Field(description="of the weight, with its rows where only some were fitted at a time")
    error_before: float = Field(description="relative squared error of its outputs, on the examples fitted")
    error_after: float = Field(description="the same, afterwards")
    held_out_before: float = Field(description="the same on examples held out; NaN: none were")
    held_out_after: float = Field(description="the same, afterwards")
    iterations: int = Field(ge=0, description="of conjugate gradients; 0 where the solve was direct")
    residual: float = Field(description="of the normal equations, relative to their right side")
    seconds: float
    left: str = Field(default="", description="why it stays as it was; then the errors are NaN")


class ReconstructionRecord(_Schema):
    """What the reconstruction after a cut did."""

    increase: float = Field(description="of the mean loss on the calibration examples; mostly negative")
    layers: list[LayerFitRecord] = Field(description="in the order in which they were fitted")
    left: dict[str, str] = Field(description="weights that are as the cut left them, and why")


class LevelRecord(_Schema):
    """What was reached at one of the sparsities that were asked for."""

    sparsity: float = Field(description="asked for, as a fraction of the prunable weights")
    achieved: float = Field(description="removed, as a fraction of the prunable weights")
    achieved_total: float = Field(description="removed, as a fraction of all parameters of the model")
    pruned: dict[str, float] = Field(description="metrics after the cut and reconstruction, before fine-tuning")
    finetuned: dict[str, float] | None = Field(description="metrics after fine-tuning; null: there was none")
    predicted_increase: float = Field(description="of the mean loss per example, by the quadratic model")
    measured_increase: float = Field(description="of the mean loss per example, over the same cuts")
    reconstructed_increase: float = Field(default=0.0, description="of the same loss, by the reconstructions")
    layer_sparsity: dict[str, float] = Field(description="fraction removed, by parameter name")


class StepRecord(_Schema):
    """One cut on the way to a level."""

    index: int = Field(ge=0, description="from 0, over the whole run")
    sparsity: float = Field(description="after the step, as a fraction of the prunable weights")
    removed: int = Field(ge=0, description="weights removed in all after the step")
    refreshed: bool = Field(description="whether the curvature was estimated anew for this step")
    curvature: dict[str, float] = Field(description="the figures that the estimator returned")
    damping: float = Field(description="γ in units of the Fisher")
    predicted_increase: float = Field(description="of the mean loss per example, by the quadratic model")
    measured_increase: float = Field(description="of the mean loss on the calibration examples")
    iterations: int = Field(ge=0, description="of conjugate gradients; 0 where the removal was direct")
    residual: float = Field(description="relative, at the end of conjugate gradients")
    reconstruction: ReconstructionRecord | None = Field(default=None, description="null: there was none")
    pruned: dict[str, float] | None = Field(description="metrics after the cut and reconstruction; null: not measured")
    finetuned: dict[str, float] | None = Field(description="metrics after fine-tuning; null: there was none")
    seconds: dict[str, float] = Field(description="wall-clock time, by part of the step")


class RunRecord(_Schema):
    """The whole of `record.json`: what was run, on what, and what came out."""

    schema_version: int = SCHEMA_VERSION
    key: str = Field(description="SHA-256 of the identity, in hexadecimal")
    task: str
    estimator: str
    settings: dict[str, Any] = Field(description="resolved: every default written out")
    identity: dict[str, Any] = Field(description="everything that was hashed into the key")
    started: str = Field(description="ISO 8601, UTC")
    finished: str | None = Field(default=None, description="ISO 8601, UTC; null while running")
    machine: dict[str, str] = Field(description="python, torch, platform, processor, threads, device")
    plugins: list[dict[str, Any]] = Field(description="name and version of each plugin used")
    parameters: dict[str, Any] = Field(description="prunable, total, and why each other one is skipped")
    structures: dict[str, str] = Field(
        default_factory=dict, description="name of a parameter -> how its curvature is modelled, where that differs"
    )
    path: Literal["independent", "sequential"] = Field(
        description="independent: each level starts from the dense network; sequential: from the level before"
    )
    dense: dict[str, float] = Field(description="metrics of the dense network")
    levels: list[LevelRecord] = Field(default_factory=list)
    steps: list[StepRecord] = Field(default_factory=list)
    seconds: dict[str, float] = Field(default_factory=dict, description="wall-clock time, by part of the run")
    peak_memory_bytes: int = Field(default=0, ge=0, description="the largest resident or device memory seen")
    degraded: list[str] = Field(default_factory=list, description="what was permitted to go less well")
    status: Literal["running", "finished"] = "running"
    files: dict[str, str] = Field(
        default_factory=dict, description="SHA-256 of the files beside a finished record, by name"
    )


def run_key(identity: Mapping[str, Any]) -> str:
    """SHA-256 of an identity's canonical JSON: keys sorted, no white space; 64 hexadecimal digits."""
    plain = _plain(identity, finite_only=True)
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any, *, finite_only: bool = False) -> Any:
    """Mappings and sequences as dict and list; with `finite_only`, non-finite floats as strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, finite_only=finite_only) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, finite_only=finite_only) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and finite_only and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"settings and identities are plain data; {type(value).__name__} given: {value!r}")


@contextmanager
def _reported(action: str, path: Path) -> Iterator[None]:
    """What the disk refuses, as one sentence with the path and the cause."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise RecordError(f"cannot {action} {path}: {cause}; check free space and permissions") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`: what is written there is synced and takes its place, or vanishes.

    Raises:
        RecordError: the disk refuses; the old file, if any, is untouched and nothing is left beside it.
    """
    # Not tempfile: its files are readable by their owner alone, results are to be shared as umask says.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with _reported("write", path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors puts a file of its own there, for its owner alone
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        if os.name == "posix":  # the new name itself is on disk only once its folder is
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file so that at any moment it is the old one or the new one, whole.

    Raises:
        RecordError: the disk refuses; the old file, if any, is untouched and nothing is left beside it.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Put tensors of any devices on disk as one safetensors file, whole or not at all.

    Raises:
        RecordError: the disk refuses.
    """
    # A copy each, because safetensors refuses tensors that share memory, and tied weights do.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(copies, temporary, metadata={**metadata, checksums.KEY: checksums.of_tensors(copies, metadata)})


def read_tensors(path: Path, names: Iterable[str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, or those of `names`; metadata) of a safetensors file.

    Raises:
        OSError, SafetensorError: it cannot be read.
        ValueError: a tensor is not what its checksum says.
    """
    with safe_open(path, framework="pt") as file:
        wanted = file.keys() if names is None else names
        tensors, metadata = {name: file.get_tensor(name) for name in wanted}, dict(file.metadata() or {})
    checksums.check_tensors(tensors, metadata)
    metadata.pop(checksums.KEY, None)
    return tensors, metadata


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

    Each file is written to a temporary name and renamed, so that a reader sees whole files only.

    Attributes:
        path: the folder; made when something is first written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Beside the folder, so that --fresh can remove the folder while it holds the lock.
        self._lock_path = path.parent / ".locks" / f"{path.name}.lock"
        # The file of the checkpoint's large tensors, and these as they were then.
        self._part: Path | None = None
        self._in_part: dict[str, tuple[weakref.ref[Tensor], int]] = {}

    @classmethod
    def of(cls, root: Path, task: str, estimator: str, key: str) -> RunDirectory:
        """The folder that a run has under `root`."""
        return cls(Path(root) / f"{task}-{estimator}-{key[:12]}")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process.

        Raises:
            RecordError: another process holds it.
        """
        lock = FileLock(self._lock_path)
        with _reported("lock", self._lock_path):
            self._lock_path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise RecordError(
                    f"another process is working on this run ({self.path}); wait for it to finish, or stop it"
                ) from error
        try:
            for stray in self.path.glob(".*.tmp"):  # of a process that was killed while it wrote
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
        """Put `record.json` in the place of the one before, whole."""
        atomic_write(self.record_path, checksums.sealed(record.model_dump_json()))

    def results(self) -> dict[str, str]:
        """The checksums of the files that a finished run leaves beside its record, by name, where there are any."""
        paths = [self.path / name for name in RESULTS]
        with _reported("read", self.path):
            return {path.name: checksums.of_file(path) for path in paths if path.exists()}

    def check_results(self, record: RunRecord) -> None:
        """Refuse a finished run whose files are not what it wrote.

        Raises:
            DamagedError: one is absent or changed.
        """
        found = self.results()
        for name, checksum in record.files.items():
            if found.get(name) != checksum:
                what = "is gone" if name not in found else "is not what the run wrote"
                raise DamagedError(f"{self.path / name} {what}; do the run again with --fresh")

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """`run.yaml`: the settings, from which the run can be repeated."""
        text = yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True)
        atomic_write(self.path / "run.yaml", text.encode())

    def write_result(self, space: ParameterSpace, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
        """`weights.safetensors` and `mask.safetensors`.

        Args:
            space: the prunable parameters.
            weights: the model's whole state_dict.
            kept: for each parameter of the space a bool tensor of its shape, True = kept.
        """
        _check_kept(kept, space, "the mask")
        write_tensors(self.path / "mask.safetensors", kept, MASK_METADATA)
        write_tensors(self.path / "weights.safetensors", weights, {"format": "pt"})

    @property
    def checkpoint_path(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoint"

    def save_checkpoint(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Put all that resuming after `step` needs on disk; only then remove older checkpoints.

        Large tensors go into a file of their own, which stays for as long as most of them are the same objects and
        unchanged: what an estimator has learned outlasts many a step. A change is seen where torch counts it, not
        through `.data`, numpy or a fused optimiser.

        Args:
            step: steps done; names the file.
            tensors: of any devices; read back on the CPU.
            meta: plain data; floats come back exactly, infinities too.
        """
        path = self.checkpoint_path / f"{step:05d}.safetensors"
        large = {name: tensor for name, tensor in tensors.items() if tensor.nbytes >= LARGE}
        same = {name: tensor for name, tensor in large.items() if self._is_in_part(name, tensor)}
        if 2 * sum(t.nbytes for t in same.values()) < sum(t.nbytes for t in large.values()):
            part = self.checkpoint_path / f"{uuid.uuid4().hex[:12]}.part"  # the one before belongs to its checkpoint
            write_tensors(part, large, {"format": "pt"})
            self._part, same = part, large
            self._in_part = {
                name: (weakref.ref(tensor), tensor._version)
                for name, tensor in large.items()
                if not tensor.is_inference()  # does not count its changes
            }
        elif not large:
            self._forget_part()
        part_of = {} if self._part is None else {"file": self._part.name, "names": sorted(same)}
        rest = {name: tensor for name, tensor in tensors.items() if name not in same}
        write_tensors(path, rest, {"format": "pt", "meta": json.dumps(_plain(meta)), "part": json.dumps(part_of)})
        with _reported("remove old checkpoints in", self.checkpoint_path):
            for other in self.checkpoint_path.iterdir():  # half-written ones of a killed process, too
                if other not in (path, self._part) and other.suffix in {".safetensors", ".part", ".tmp"}:
                    other.unlink()

    def _is_in_part(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor is in the part on disk as it is now."""
        found, version = self._in_part.get(name, (lambda: None, 0))
        return found() is tensor and tensor._version == version

    def _forget_part(self) -> None:
        self._part, self._in_part = None, {}

    def load_checkpoint(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """(step, tensors, meta) of the newest whole checkpoint, or None where there is none.

        Raises:
            DamagedError: there are checkpoints and none of them is whole.
        """
        found = self.checkpoint_path.glob("*.safetensors")
        paths = sorted(found, key=lambda path: (len(path.name), path.name), reverse=True)
        for path in paths:
            try:
                tensors, metadata = read_tensors(path)
                if part := json.loads(metadata.get("part", "{}")):
                    tensors |= read_tensors(self.checkpoint_path / part["file"], part["names"])[0]
                return int(path.stem), tensors, json.loads(metadata["meta"])
            except (SafetensorError, FileNotFoundError, ValueError, KeyError):
                continue  # cut short: the one before it is whole
            except OSError as error:
                raise RecordError(f"cannot read the checkpoint {path}: {error}") from error
        if paths:
            raise DamagedError(f"no checkpoint in {self.checkpoint_path} is whole; start again with --fresh")
        return None

    def clear_checkpoints(self) -> None:
        """Remove all checkpoints."""
        self._forget_part()
        self._remove(self.checkpoint_path)

    def discard(self) -> None:
        """Remove the run's folder and all that is in it, the record first: it must not speak of what is gone."""
        self._forget_part()
        with _reported("remove", self.record_path):
            self.record_path.unlink(missing_ok=True)
        self._remove(self.path)

    @staticmethod
    def _remove(path: Path) -> None:
        with _reported("remove", path), suppress(FileNotFoundError):
            shutil.rmtree(path)
