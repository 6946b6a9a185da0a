"""Workers do what they are given, tell what went wrong, and end with whoever started them."""

import os
import subprocess
import sys
import time

import psutil
import pytest
import torch

from sparsekit.compare.executors import LocalExecutor, RayExecutor, WorkerDied
from sparsekit.errors import SettingsError
from sparsekit.machine import gpus

# What workers can import: they know nothing of the tests' modules.
PID = "__import__('os').getpid()"
THREADS = "__import__('torch').get_num_threads()"
GPU = "(__import__('time').sleep(0.3), __import__('os').environ['CUDA_VISIBLE_DEVICES'])[1]"  # so that both get a job
DIE = "__import__('os').kill(__import__('os').getpid(), 9)"
FAIL = "__import__('sparsekit.runs.settings').runs.settings.parse_assignment('no such thing')"


@pytest.fixture(scope="module")
def executor():
    with LocalExecutor(1, threads=1) as made:
        yield made


def test_a_worker_is_a_process_of_its_own_and_lives_on(executor):
    first, second = (executor.submit(eval, PID).result() for _ in range(2))
    assert first == second != os.getpid()


def test_a_worker_has_the_threads_that_were_asked_for(executor):
    assert executor.submit(eval, THREADS).result() == 1


def test_what_a_job_raises_its_future_raises(executor):
    with pytest.raises(SettingsError, match="no such thing"):
        executor.submit(eval, FAIL).result()


def test_a_worker_that_is_killed_is_told_and_replaced(executor):
    with pytest.raises(WorkerDied, match=r"ended with code -9: it was killed, or ran out of memory"):
        executor.submit(eval, DIE).result()
    assert executor.submit(eval, PID).result() != os.getpid()


def test_closing_ends_what_is_running():
    made = LocalExecutor(1)
    worker = made.submit(eval, PID).result()
    future = made.submit(time.sleep, 60)
    while not future.running():
        time.sleep(0.01)
    begun = time.perf_counter()
    made.close()
    with pytest.raises(WorkerDied):
        future.result()
    assert time.perf_counter() - begun < 30
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\n"
        "from sparsekit.compare.executors import LocalExecutor\n"
        "if __name__ == '__main__':\n"
        "    made = LocalExecutor(1)\n"
        f"    print(made.submit(eval, {PID!r}).result(), flush=True)\n"
        "    made.submit(time.sleep, 600)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    worker.wait(timeout=20)


def test_ray_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match=r"needs Ray: pip install 'sparsekit\[ray\]'"):
        RayExecutor(1, 1 << 30)


@pytest.mark.slow
def test_ray_does_jobs_and_tells_their_errors():
    pytest.importorskip("ray")
    with RayExecutor(1, 1 << 28) as made:
        assert made.submit(eval, PID).result() != os.getpid()
        with pytest.raises(SettingsError, match="no such thing"):
            made.submit(eval, FAIL).result()
        with pytest.raises(WorkerDied):
            made.submit(eval, DIE).result()


class Unknown:
    """What cannot be made again elsewhere."""

    def __reduce__(self):
        return (__import__, ("no_such_module",))


def test_what_a_worker_cannot_import_is_told(executor):
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        executor.submit(str, Unknown()).result()


def test_each_worker_sees_a_gpu_of_its_own():
    with LocalExecutor(2, gpus=["4", "6"]) as made:
        seen = [made.submit(eval, GPU) for _ in range(4)]
        assert {future.result() for future in seen} == {"4", "6"}


@pytest.mark.parametrize(
    ("device", "environment", "found"),
    [("cuda", None, ["0", "1"]), ("cuda", "3,5", ["3", "5"]), ("cuda:1", None, []), ("cpu", None, [])],
)
def test_gpus_that_workers_share_out(monkeypatch, device, environment, found):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if environment:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", environment)
    assert gpus(torch.device(device)) == found
