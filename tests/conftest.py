import os
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from sparsekit.compare.executors import Executor

sys.path.insert(0, str(Path(__file__).parent / "device"))

# Problems here are tiny: more threads only wait for one another, and sums come out the same everywhere.
torch.set_num_threads(int(os.environ.get("SPARSEKIT_TEST_THREADS", "1")))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory, monkeypatch_session):
    """Trained networks and decoded images of the tests stay among themselves."""
    monkeypatch_session.setenv("SPARSEKIT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def monkeypatch_session():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


class Inline(Executor):
    """Jobs are done where they are submitted."""

    def submit(self, function, job):
        future = Future()
        try:
            future.set_result(function(job))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self):
        pass


@pytest.fixture(scope="session")
def inline():
    return Inline()


@pytest.fixture(scope="session")
def accelerator():
    """A CUDA device, or the pretended one where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    import pretend

    try:
        return pretend.register()
    except pretend.Unbuilt as error:
        pytest.skip(str(error))
