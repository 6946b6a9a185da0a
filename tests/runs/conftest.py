"""One MLflow store for all tests of tracking."""

import pytest

from sparsekit.runs import tracking_store
from sparsekit.runs.tracking_store import default_uri, initialise


@pytest.fixture(scope="session")
def output(tmp_path_factory):
    # One database for all tests, because making it takes seconds; a name that needs care in URIs.
    return tmp_path_factory.mktemp("with space%20#and é")


@pytest.fixture(scope="session")
def uri(output):
    address = default_uri(output)
    initialise(address)
    return address


@pytest.fixture(scope="session")
def client(uri):
    return tracking_store.client_of(uri)
