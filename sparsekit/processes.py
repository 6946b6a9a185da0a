"""Several processes that share the examples of one run, as `torchrun` starts them (torch.distributed).

Every process does the whole run on the same weights. Only sums over calibration examples are shared: each process takes
its share of the batches. The first process (rank 0) alone writes, tracks and prints.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch import distributed as dist

from sparsekit.errors import SparsekitError

#: The dense network may be trained by one process while the others wait; `torchrun` ends all of them when one fails.
TIMEOUT = timedelta(hours=24)


class ProcessError(SparsekitError):
    """Another process of the run has ended."""


def size() -> int:
    """The number of processes; 1 outside of `group`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


@contextmanager
def group(device: str) -> Iterator[Path | None]:
    """Inside, the processes that `torchrun` started are a group; nothing happens where it started none, or one.

    Args:
        device: as in the settings of a run; with CUDA each process takes the device of its local rank.

    Yields:
        A folder of its own for each process but the first, which is deleted at the end; None for the first.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield None
        return
    on_gpu = torch.cuda.is_available() and device in ("auto", "cuda")
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        _store().set(f"sparsekit/{dist.get_rank()}", f"{os.getpid()} {os.uname().nodename}")
        barrier()
        with tempfile.TemporaryDirectory(prefix="sparsekit-") as folder:
            yield Path(folder) if dist.get_rank() else None
    finally:
        dist.destroy_process_group()


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process passes through alone; the others follow when it is done."""
    if rank():
        barrier()
    yield
    if not rank():
        barrier()


def barrier() -> None:
    """Wait for all processes.

    Raises:
        ProcessError: one of them has ended.
    """
    if size() > 1:
        with _told_who_ended():
            dist.barrier()


def summed(part: Tensor) -> Tensor:
    """The sum over all processes of a tensor of one shape and type, which is overwritten.

    Raises:
        ProcessError: a process has ended.
    """
    if size() > 1:
        part = part.contiguous()
        with _told_who_ended():
            dist.all_reduce(part)
    return part


@contextmanager
def _told_who_ended() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        others = [number for number in range(size()) if number != rank()]
        gone = [number for number in others if not _lives(number)]
        who = " and ".join(f"process {number}" for number in gone) or "another process"
        raise ProcessError(
            f"process {rank()} of {size()}: {who} has ended in the middle of the run; its own message says why, and "
            f"--resume goes on from the last checkpoint ({type(error).__name__})"
        ) from error


def _lives(number: int) -> bool:
    """Whether a process still runs; those of other machines are taken to."""
    try:
        pid, host = _store().get(f"sparsekit/{number}").decode().split(" ", 1)
    except RuntimeError:  # the store went with the first process
        return number != 0
    if host != os.uname().nodename:
        return True
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
