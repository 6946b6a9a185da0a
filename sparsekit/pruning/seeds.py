"""Random generators derived from a run's seed, so that resuming needs no generator's state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator_for(seed: int, purpose: str, index: int, device: torch.device | None = None) -> torch.Generator:
    """A separate generator for each purpose and step, so that draws of one do not affect another."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    generator = torch.Generator(device or torch.device("cpu"))
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return generator


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, from which layers such as dropout draw; their states are restored on exit."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
