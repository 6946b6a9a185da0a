"""Files that are whole or not there: atomic writes, and tensors with checksums."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsekit import checksums
from sparsekit.errors import RecordError


@contextmanager
def reported(action: str, path: Path) -> Iterator[None]:
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
    with reported("write", path):
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


def remove_folder(path: Path) -> None:
    """Remove a folder and all that is in it; nothing where there is none.

    Raises:
        RecordError: the disk refuses.
    """
    with reported("remove", path), suppress(FileNotFoundError):
        shutil.rmtree(path)
