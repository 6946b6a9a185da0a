"""Executors of jobs: local processes or Ray. Both take a function and its argument, and return a future."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle, repeat
from multiprocessing.connection import Connection
from typing import Any, Self, TypeVar

import torch

from sparsekit.errors import SettingsError, SparsekitError

T = TypeVar("T")
R = TypeVar("R")


class WorkerDied(SparsekitError):
    """The process that ran a job has ended; its files on disk are whole."""


class Executor(ABC):
    """Runs jobs in parallel. A job is a picklable function with one picklable argument."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @abstractmethod
    def submit(self, function: Callable[[T], R], job: T) -> Future[R]:
        """Queue a job; its future raises what the function raised, or WorkerDied."""

    @abstractmethod
    def close(self) -> None:
        """Stop at once; running jobs are ended."""


class LocalExecutor(Executor):
    """Local worker processes, each driven by a thread; they run until `close`, and are replaced if they die.

    Args:
        workers: number of processes.
        threads: number of torch's threads in each.
        gpus: names of GPUs as CUDA_VISIBLE_DEVICES has them; workers take turns, and each sees its own alone. Without
            any, all see what this process sees.
    """

    def __init__(self, workers: int, threads: int = 1, gpus: Sequence[str] = ()) -> None:
        self._threads = threads
        self._gpus = cycle(gpus) if gpus else repeat(None)
        self._context = multiprocessing.get_context("spawn")  # a forked torch hangs in its thread pools
        self._pool = ThreadPoolExecutor(workers)
        self._own = threading.local()
        self._living: set[Any] = set()
        self._closed = False

    def submit(self, function: Callable[[T], R], job: T) -> Future[R]:
        return self._pool.submit(self._run, function, job)

    def _run(self, function: Callable[[T], R], job: T) -> R:
        if getattr(self._own, "worker", None) is None:
            mine, its = self._context.Pipe()
            if not hasattr(self._own, "gpu"):  # a worker that takes another's place takes its GPU
                self._own.gpu = next(self._gpus)
            given = its, self._threads, os.getpid(), self._own.gpu
            worker = self._context.Process(target=_serve, args=given, daemon=True)
            worker.start()
            its.close()
            self._own.worker, self._own.pipe = worker, mine
            self._living.add(worker)
            if self._closed:  # meanwhile
                worker.terminate()
        try:
            self._own.pipe.send((function, job))
            failed, result = self._own.pipe.recv()
        except (EOFError, OSError) as error:
            worker, self._own.worker = self._own.worker, None
            self._living.discard(worker)
            worker.join()
            raise WorkerDied(
                f"the worker process ended with code {worker.exitcode}: it was killed, or ran out of memory; with "
                "fewer --workers each has more"
            ) from error
        if failed:
            raise result
        return result

    def close(self) -> None:
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._living):
            worker.terminate()
        self._pool.shutdown()


def _serve(pipe: Connection, threads: int, parent: int, gpu: str | None) -> None:
    """The main function of a worker: run jobs until the pipe is closed or the parent has ended."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when CUDA is used first
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; only the parent handles it
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    while True:
        try:
            given = pipe.recv_bytes()
        except EOFError:
            return
        try:
            function, job = pickle.loads(given)  # here, so that import errors are sent back
            answer = (False, function(job))
        except Exception as error:
            answer = (True, _portable(error))
        pipe.send(answer)


def _portable(error: Exception) -> Exception:
    """The error, or a RuntimeError with its message where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _follow(parent: int) -> None:
    """End this process when the parent has ended, even if it was killed, so that locks are freed at once."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class RayExecutor(Executor):
    """Tasks of Ray, on this machine or a cluster whose machines share the same folders.

    Args:
        threads: cores for each job.
        memory: bytes for each job.
        gpus: for each job.
        address: of the cluster; None: $RAY_ADDRESS, or a new instance on this machine.
    """

    def __init__(self, threads: int, memory: int, gpus: int = 0, address: str | None = None) -> None:
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # an offline tool sends no telemetry
            import ray
        except ImportError:
            raise SettingsError("--executor ray needs Ray: pip install 'sparsekit[ray]'") from None
        self._ray = ray
        ray.init(address=address, log_to_driver=False, configure_logging=False, include_dashboard=False)
        self._options = {"num_cpus": threads, "num_gpus": gpus, "memory": memory, "max_retries": 0}
        self._threads = threads

    def submit(self, function: Callable[[T], R], job: T) -> Future[R]:
        task = self._ray.remote(**self._options)(_with_threads)
        answer: Future[R] = Future()
        inner = task.remote(self._threads, function, job).future()
        inner.add_done_callback(lambda done: self._translate(done, answer))
        return answer

    def _translate(self, done: Future[Any], answer: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            answer.set_result(done.result())
        elif isinstance(error, self._ray.exceptions.RayTaskError):
            answer.set_exception(error.cause)
        else:
            answer.set_exception(WorkerDied(f"Ray lost the worker: {str(error).splitlines()[0]}"))

    def close(self) -> None:
        self._ray.shutdown()


def _with_threads(threads: int, function: Callable[[T], R], job: T) -> R:
    torch.set_num_threads(threads)
    return function(job)
