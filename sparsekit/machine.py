"""The machine: its devices, memory and clock."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn

from sparsekit.errors import SettingsError


class Memory(NamedTuple):
    """Bytes that can still be allocated where the model is, and on the host; the same without an accelerator."""

    device: int
    host: int


def find_device(asked: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`, or of another type that torch knows here.

    Raises:
        SettingsError: an accelerator was asked for and is not there.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = asked.partition(":")
    if kind != "cpu":
        module: Any = getattr(torch, kind, None)
        count = module.device_count() if hasattr(module, "device_count") and module.is_available() else 0
        if int(number or 0) >= count:  # before torch sees it, which takes no number above 127
            shown = kind.upper() if kind == "cuda" else f"'{kind}'"
            found = f"{count} {shown} devices" if count else f"no {shown} device"
            raise SettingsError(f"device '{asked}' was asked for; torch finds {found} here. Use --device cpu or auto")
    return torch.device(asked)


def accelerator(device: torch.device) -> Any:
    """Torch's module for an accelerator's type, such as `torch.cuda`; None for the CPU."""
    return None if device.type in ("cpu", "meta") else torch.get_device_module(device)


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus(device: torch.device) -> list[str]:
    """Names, as CUDA_VISIBLE_DEVICES has them, of the GPUs that workers may share out; none for `cuda:N` or the CPU."""
    if str(device) != "cuda":
        return []
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[: torch.cuda.device_count()] or [str(index) for index in range(torch.cuda.device_count())]


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that was asked of it."""
    module = accelerator(device)
    if module is not None:
        module.synchronize(device)


def describe_machine(device: torch.device) -> dict[str, str]:
    """What a run's seconds were measured on, and with which versions."""
    module = accelerator(device)
    name = module.get_device_name(device) if module else platform.processor() or platform.machine()
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
    module = accelerator(device)
    if module is not None:
        module.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # a kernel without it
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(model: nn.Module) -> int:
    """Bytes: allocated on the accelerator, or resident in the process, at most since `forget_peak_memory`."""
    device = next(model.parameters()).device
    module = accelerator(device)
    if module is not None:
        return int(module.max_memory_allocated(device))
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
    """Bytes that can still be allocated on the device and on the host.

    What torch's allocator holds in its cache is free: it gives it out again.
    """
    host, module = int(psutil.virtual_memory().available), accelerator(device)
    if module is None:
        return Memory(host, host)
    cached = module.memory_reserved(device) - module.memory_allocated(device)
    return Memory(int(module.mem_get_info(device)[0]) + max(int(cached), 0), host)


def now() -> str:
    """ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
