"""Several processes share the examples of a run and give the figures of one."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from sparsekit import processes

RUN = ["run", "--task", "digits", "--sparsity", "0.8", "--schedule", "one-shot", "--set", "finetune.epochs=0"]
RUN += ["--set", "estimator.examples=128", "--set", "estimator.batch_size=4", "--no-tracking"]
RUN += ["--reconstruct", "fisher", "--set", "reconstruction.examples=64"]


def launched(folder, count, *args):
    launcher = [] if count == 1 else ["-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone"]
    command = [sys.executable, *launcher, "-m", "sparsekit", *RUN, "--output", str(folder), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def record(folder):
    [path] = folder.glob("digits-*/record.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Estimator -> the record of a run in one process."""
    found = {}

    def of(estimator):
        if estimator not in found:
            folder = tmp_path_factory.mktemp(estimator)
            done = launched(folder, 1, "--estimator", estimator)
            assert done.returncode == 0, done.stderr
            found[estimator] = record(folder)
        return found[estimator]

    return of


@pytest.mark.parametrize(
    "estimator, count",
    [
        ("fishleg", 2),
        pytest.param("fishleg", 4, marks=pytest.mark.slow),
        pytest.param("diagonal", 2, marks=pytest.mark.slow),
        pytest.param("woodfisher", 2, marks=pytest.mark.slow),
    ],
)
def test_several_processes_give_the_figures_of_one(alone, tmp_path, estimator, count):
    done = launched(tmp_path, count, "--estimator", estimator)
    assert done.returncode == 0, done.stderr
    found, expected = record(tmp_path), alone(estimator)
    assert found["key"] == expected["key"]
    for a, b in zip(found["levels"], expected["levels"], strict=True):
        for field in ("predicted_increase", "measured_increase"):
            assert a[field] == pytest.approx(b[field], rel=1e-5)
        assert a["pruned"]["loss"] == pytest.approx(b["pruned"]["loss"], rel=1e-5)
    assert done.stdout.count("prunable weights") == 1  # the first process alone prints


def test_a_run_that_is_finished_is_finished_for_all_processes(tmp_path):
    for _ in range(2):
        done = launched(tmp_path, 2, "--estimator", "diagonal")
        assert done.returncode == 0, done.stderr
    assert "finished before" in done.stdout


def test_more_processes_than_batches_are_refused(tmp_path):
    done = launched(tmp_path, 2, "--estimator", "diagonal", "--set", "estimator.batch_size=64")
    assert done.returncode != 0
    assert "2 calibration batches are shared by 2 processes, 8 at a time" in done.stderr


DYING = """
import os
import torch
from sparsekit import processes
from sparsekit.curvature import SharedSum

with processes.group("cpu"):
    if processes.rank() == 1:
        os._exit(9)
    for _ in range(100):
        total = SharedSum()
        total.add(torch.ones(1000))
        total.value()
"""


def test_a_process_that_dies_is_named():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = [
        subprocess.Popen([sys.executable, "-c", DYING], env={**shared, "RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    told = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [1, 9]
    assert "ProcessError: process 0 of 2: process 1 has ended in the middle of the run" in told[0]


def test_one_process_is_no_group():
    with processes.group("cpu") as apart:
        assert apart is None
        assert (processes.size(), processes.rank()) == (1, 0)
        part = torch.ones(3)
        assert processes.summed(part) is part
