"""What a run was made of: everything that determines its result, and the machine that it ran on."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from sparsekit.methods.interfaces import INTERFACE_VERSION, Memory, Task
from sparsekit.registry.registry import Registry
from sparsekit.runs.records import SCHEMA_VERSION
from sparsekit.runs.settings import COMPONENTS, ResolvedRun


def sources(task: Task, model: nn.Module) -> dict[str, str]:
    """Hashes of what a run starts from: `weights` of the dense network, and `data`."""
    return {"weights": _hash_tensors(model.state_dict()), "data": task.fingerprint()}


def identity(
    resolved: ResolvedRun, registry: Registry, found: Mapping[str, str], device: torch.device
) -> dict[str, Any]:
    """All that determines the result, and nothing else; `found` is of `sources`."""
    settings = resolved.as_dict()
    for key in ("output", "tracking", "preset"):  # what a preset sets is written out
        del settings[key]
    settings["device"] = device.type
    for key in ("data_dir", "checkpoint"):  # paths; what lies there is hashed below
        settings["task"].pop(key, None)
    return {
        "settings": settings,
        **found,
        "plugins": plugins_used(resolved, registry),
        "schema": SCHEMA_VERSION,
        "interface": INTERFACE_VERSION,
    }


def plugins_used(resolved: ResolvedRun, registry: Registry) -> list[dict[str, Any]]:
    """Name, distribution and version of each plugin that a run uses."""
    providers = (registry.provider(kind, resolved.classes[kind].name) for kind in COMPONENTS)
    infos = {(info.name, info.distribution): info for info in providers}
    return [{"name": info.name, "distribution": info.distribution, "version": info.version} for info in infos.values()]


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def machine(device: torch.device) -> dict[str, str]:
    """What a run's seconds were measured on, and with which versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "device": f"{device.type}: {name}",
    }


def forget_peak_memory(device: torch.device) -> None:
    """Have `peak_memory` speak of what comes; on other systems than Linux it speaks of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # a kernel without it
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(model: nn.Module) -> int:
    """Bytes: allocated on the CUDA device, or resident in the process, at most since `forget_peak_memory`."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        with suppress(OSError):
            lines = Path("/proc/self/status").read_text().splitlines()
            [peak] = [line.split()[1] for line in lines if line.startswith("VmHWM:")] or [""]
            if peak:
                return int(peak) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def available_memory(device: torch.device) -> Memory:
    """Bytes that can still be allocated on the device and on the host."""
    host = int(psutil.virtual_memory().available)
    return Memory(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host, host)


def now() -> str:
    """ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
