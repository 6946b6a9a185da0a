import os

import pytest
import torch

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
