"""Checksums of what a run writes: a file that was cut short, emptied or changed is told from a whole one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

#: The key that a sealed JSON object or a tensor file's metadata has its checksums under.
KEY = "sha256"


def sealed(text: str) -> bytes:
    """A JSON object with a checksum of its content as its last entry, indented."""
    content = json.loads(text)
    return json.dumps({**content, KEY: _of_json(content)}, indent=2, ensure_ascii=False).encode() + b"\n"


def unsealed(content: bytes) -> str:
    """The JSON object that was sealed; one without a checksum, as former versions wrote it, as it is.

    Raises:
        ValueError: it is no JSON object, or not the one that was sealed.
    """
    found = json.loads(content)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    checksum = found.pop(KEY, None)
    if checksum is not None and checksum != _of_json(found):
        raise ValueError("its content is not what its checksum says")
    return json.dumps(found)


def _of_json(content: Mapping[str, object]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def of_file(path: Path) -> str:
    """Of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """A JSON object: for each tensor (on the CPU, contiguous) and each entry of the metadata its checksum."""
    sums = {f"tensor {name}": _of_tensor(tensor) for name, tensor in tensors.items()}
    sums |= {f"entry {key}": hashlib.sha256(value.encode()).hexdigest() for key, value in metadata.items()}
    return json.dumps(sums)


def check_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Refuse tensors, some or all of a file's, that are not what the file's metadata has checksums of.

    Raises:
        ValueError: with the first that is not. A file without checksums, of a former version, passes.
    """
    if KEY not in metadata:
        return
    sums = json.loads(metadata[KEY])
    found = {key: value for key, value in metadata.items() if key != KEY}
    for name, checksum in json.loads(of_tensors(tensors, found)).items():
        if sums.get(name) != checksum:
            raise ValueError(f"the {name} is not what its checksum says")
    if lost := {key for key in sums if key.startswith("entry ")} - {f"entry {key}" for key in found}:
        raise ValueError(f"the {lost.pop()} is gone")


def _of_tensor(tensor: Tensor) -> str:
    whole = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if tensor.numel():
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()
