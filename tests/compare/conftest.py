from concurrent.futures import Future

import pytest

from sparsekit.compare.executors import Executor


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
