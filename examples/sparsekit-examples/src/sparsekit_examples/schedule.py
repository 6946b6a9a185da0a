"""The schedule `sine`."""

from collections.abc import Sequence
from math import pi, sin

from sparsekit import Schedule, Settings


class Sine(Schedule[Settings]):
    """s_t = s_0 + (s_f − s_0) sin(πt / 2T): fast at first, slow at the end."""

    name = "sine"

    def sparsities(self, start: float, target: float, steps: int) -> Sequence[float]:
        return [*(start + (target - start) * sin(pi * t / (2 * steps)) for t in range(1, steps)), target]
