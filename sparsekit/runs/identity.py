"""A run's identity: everything that determines its result."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsekit.methods.interfaces import INTERFACE_VERSION, Task
from sparsekit.registry.registry import Registry
from sparsekit.runs.schema import SCHEMA_VERSION
from sparsekit.runs.settings import ResolvedRun
from sparsekit.runs.validation import COMPONENTS


def sources(task: Task, model: nn.Module) -> dict[str, str]:
    """Hashes of a run's inputs: `weights` of the dense network, and `data`."""
    return {"weights": _hash_tensors(model.state_dict()), "data": task.fingerprint()}


def identity(resolved: ResolvedRun, registry: Registry, found: Mapping[str, str]) -> dict[str, object]:
    """Everything that determines the result, and nothing else; `found` is the result of `sources`.

    The device is not part of it: draws are the same everywhere, so that a run may go on on another. What then
    differs is rounding, and what hangs on it, such as which of two weights of nearly equal score goes.
    """
    settings = resolved.as_dict()
    for key in ("output", "tracking", "preset", "device"):  # a preset's settings are in the others
        del settings[key]
    for key in ("data_dir", "checkpoint"):  # paths, whose contents are hashed in `found`
        settings["task"].pop(key, None)
    return {
        "settings": settings,
        **found,
        "plugins": plugins_used(resolved, registry),
        "schema": SCHEMA_VERSION,
        "interface": INTERFACE_VERSION,
    }


def plugins_used(resolved: ResolvedRun, registry: Registry) -> list[dict[str, str]]:
    """Name, distribution and version of each plugin that a run uses."""
    providers = (registry.provider(kind, resolved.names[kind]) for kind in COMPONENTS)
    infos = {(info.name, info.distribution): info for info in providers}
    return [{"name": info.name, "distribution": info.distribution, "version": info.version} for info in infos.values()]


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
