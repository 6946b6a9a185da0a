"""Attention that every transform of `torch.func` can pass through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def plain_attention() -> Iterator[None]:
    """Inside, attention uses the unfused kernel; the previous setting is restored on exit.

    Fused kernels and the fast path of torch's encoder layers have neither forward-mode derivatives nor batching rules.
    What is set is global: it is not for a generator to hold open.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
