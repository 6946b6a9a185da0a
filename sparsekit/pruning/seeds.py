"""Generators that are derived from a run's seed: resuming needs no generator's state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator_for(seed: int, purpose: str, index: int, device: torch.device | None = None) -> torch.Generator:
    """A generator of its own for each purpose and step: draws of one change nothing in another."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    generator = torch.Generator(device or torch.device("cpu"))
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return generator


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Layers such as dropout draw from torch's global generators: seeded here, and put back as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
