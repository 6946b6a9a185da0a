"""Wall-clock time by phase."""

from __future__ import annotations

import time

import torch

from sparsekit.machine import wait_for


class Clock:
    """Seconds by phase; waits for the device, so that each phase includes its own work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def _now(self) -> float:
        wait_for(self._device)
        return time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap, or since the clock was made, to `phase`."""
        now = self._now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
