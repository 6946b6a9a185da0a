"""Checkpoints of a run: everything that a resumed run needs, in one file, and a second one for large tensors."""

from __future__ import annotations

import json
import uuid
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from sparsekit.errors import DamagedError, RecordError
from sparsekit.files import read_tensors, remove_folder, reported, write_tensors
from sparsekit.runs.schema import plain

#: Tensors of at least so many bytes are not written again while unchanged: gradient rows take gigabytes.
LARGE = 1 << 20


class Checkpoints:
    """The folder of a run's checkpoints.

    Attributes:
        path: the folder; created with the first checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # The file of the checkpoint's large tensors, and name -> (tensor, version) at the time of writing.
        self._part: Path | None = None
        self._in_part: dict[str, tuple[weakref.ref[Tensor], int]] = {}

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Write everything that a run resumed after `step` needs; then remove older checkpoints.

        Large tensors go into a file of their own, which is kept while most of them are the same objects and unchanged:
        an estimator's statistics often last for many steps. Changes are detected by torch's version counter, so not
        those through `.data`, numpy or a fused optimiser.

        Args:
            step: number of steps done; names the file.
            tensors: on any devices; `load` returns them on the CPU.
            meta: plain data; `load` returns floats exactly, also infinities.
        """
        path = self.path / f"{step:05d}.safetensors"
        large = {name: tensor for name, tensor in tensors.items() if tensor.nbytes >= LARGE}
        same = {name: tensor for name, tensor in large.items() if self._is_in_part(name, tensor)}
        if 2 * sum(t.nbytes for t in same.values()) < sum(t.nbytes for t in large.values()):
            part = self.path / f"{uuid.uuid4().hex[:12]}.part"  # a new name: the previous checkpoint needs its own
            write_tensors(part, large, {"format": "pt"})
            self._part, same = part, large
            self._in_part = {
                name: (weakref.ref(tensor), tensor._version)
                for name, tensor in large.items()
                if not tensor.is_inference()  # has no version counter
            }
        elif not large:
            self.forget()
        part_of = {} if self._part is None else {"file": self._part.name, "names": sorted(same)}
        rest = {name: tensor for name, tensor in tensors.items() if name not in same}
        write_tensors(path, rest, {"format": "pt", "meta": json.dumps(plain(meta)), "part": json.dumps(part_of)})
        with reported("remove old checkpoints in", self.path):
            for other in self.path.iterdir():  # also half-written files of a killed process
                if other not in (path, self._part) and (
                    other.suffix in {".safetensors", ".part", ".tmp"}
                    or other.name.startswith(".tmp")  # safetensors' own
                ):
                    other.unlink()

    def _is_in_part(self, name: str, tensor: Tensor) -> bool:
        """Whether the part on disk holds a tensor with its present values."""
        found, version = self._in_part.get(name, (lambda: None, 0))
        return found() is tensor and tensor._version == version

    def forget(self) -> None:
        """Make the next checkpoint write large tensors again."""
        self._part, self._in_part = None, {}

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """(step, tensors, meta) of the newest whole checkpoint, or None where there is none.

        Raises:
            DamagedError: there are checkpoints and none of them is whole.
        """
        found = self.path.glob("*.safetensors")
        paths = sorted(found, key=lambda path: (len(path.name), path.name), reverse=True)
        for path in paths:
            try:
                tensors, metadata = read_tensors(path)
                if part := json.loads(metadata.get("part", "{}")):
                    tensors |= read_tensors(self.path / part["file"], part["names"])[0]
                return int(path.stem), tensors, json.loads(metadata["meta"])
            except (SafetensorError, FileNotFoundError, ValueError, KeyError):
                continue  # not whole; the one before it is
            except OSError as error:
                raise RecordError(f"cannot read the checkpoint {path}: {error}") from error
        if paths:
            raise DamagedError(f"no checkpoint in {self.path} is whole; start again with --fresh")
        return None

    def clear(self) -> None:
        """Remove all checkpoints."""
        self.forget()
        remove_folder(self.path)
