"""Random generators derived from a run's seed, so that resuming needs no generator's state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator_for(seed: int, purpose: str, index: int) -> torch.Generator:
    """A separate generator for each purpose and step, so that draws of one do not affect another.

    It lies on the CPU, and what is drawn goes to the device: a seed then means the same draws everywhere.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return generator


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, from which layers such as dropout draw; their states are restored on exit."""
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng(devices=[] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        torch.manual_seed(seed)
        yield
