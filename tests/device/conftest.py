import pytest


@pytest.fixture
def small_run():
    from runs import run

    return run
