"""The machine: its devices, memory and clock."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import nn

from sparsekit.errors import SettingsError


class Memory(NamedTuple):
    """Bytes that can still be allocated where the model is, and on the host; the same without an accelerator."""

    device: int
    host: int


def find_device(asked: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        SettingsError: CUDA was asked for and is not there.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = asked.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(number or 0) >= count:  # before torch sees it, which takes no number above 127
            found = f"{count} CUDA devices" if count else "no CUDA device"
            raise SettingsError(f"device '{asked}' was asked for; torch finds {found} here. Use --device cpu or auto")
    return torch.device(asked)


def describe_machine(device: torch.device) -> dict[str, str]:
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
