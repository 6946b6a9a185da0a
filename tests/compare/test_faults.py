"""Faults from outside: whatever is killed, full or gone, a comparison ends with the same figures or says why not."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow

FILE = """
name: c
run: {task: digits, sparsity: [0.5, 0.9], steps: 2, finetune: {epochs: 0.5}}
methods:
  fishleg: {estimator: {name: fishleg, examples: 256}}
  obs: {estimator: {name: obs, examples: 256}}
  magnitude: {estimator: identity, saliency: magnitude, compensation: none}
axes: {reconstruction: [none, layerwise]}
seeds: [0, 1]
tune: {trials: 2, sparsity: [0.8]}
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "c.yaml").write_text(FILE)
    return tmp_path / "c.yaml"


def command(file, output, *more):
    return [sys.executable, "-m", "sparsekit", "compare", str(file), "--output", str(output), "--workers", "2", *more]


def compare(file, output, *more, **options):
    return subprocess.run(
        command(file, output, "--no-tracking", *more), capture_output=True, text=True, check=False, **options
    )


def csv(output):
    return (output / "c" / "report" / "results.csv").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "c.yaml").write_text(FILE)
    done = compare(folder / "c.yaml", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_workers_and_killed_comparisons_change_no_figure(file, tmp_path, undisturbed, seed):
    draw = random.Random(seed)
    for _ in range(40):
        with subprocess.Popen(
            command(file, tmp_path, "--no-tracking"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as parent:
            deadline = time.monotonic() + draw.uniform(8, 25)  # starting alone takes some
            while time.monotonic() < deadline and parent.poll() is None:
                time.sleep(draw.uniform(0.5, 4))
                workers = psutil.Process(parent.pid).children() if parent.poll() is None else []
                if workers and draw.random() < 0.5:
                    draw.choice(workers).kill()
            ended = parent.poll()
            if ended is None:
                parent.kill()
        if ended == 0:
            break
    assert ended == 0
    assert csv(tmp_path) == csv(undisturbed)


def test_an_interrupted_comparison_goes_on(file, tmp_path, undisturbed):
    def heard():  # whoever starts the tests in the background has them ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command(file, tmp_path, "--no-tracking"), stderr=subprocess.PIPE, text=True, preexec_fn=heard
    ) as parent:
        while not list((tmp_path / "c").glob("runs/*/record.json")):
            time.sleep(0.2)
        parent.send_signal(signal.SIGINT)
        _, told = parent.communicate(timeout=60)
    assert parent.returncode == 130
    assert "interrupted; the same command goes on" in told
    assert compare(file, tmp_path).returncode == 0
    assert csv(tmp_path) == csv(undisturbed)


def test_a_full_disk_is_said_and_nothing_is_lost(file, tmp_path, undisturbed):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        first = compare(file, disk)
        assert first.returncode != 0
        assert "No space left on device" in first.stdout + first.stderr
        assert "Traceback" not in first.stderr
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        again = compare(file, disk, "--retry-failed")
        assert again.returncode == 0, again.stdout + again.stderr
        assert csv(disk) == csv(undisturbed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_directory_that_cannot_be_written_is_said(file):
    done = compare(file, Path("/proc/nowhere"))
    assert done.returncode == 2
    assert "cannot write to" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_tracker_that_refuses_connections_stops_nothing(file, tmp_path, undisturbed):
    done = subprocess.run(
        command(file, tmp_path, "--tracking-uri", "http://127.0.0.1:9"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "tracking:" in done.stdout
    assert "sparsekit track" in done.stdout
    assert csv(tmp_path) == csv(undisturbed)


def test_two_comparisons_on_one_directory_are_refused(file, tmp_path):
    with subprocess.Popen(command(file, tmp_path, "--no-tracking"), stderr=subprocess.DEVNULL) as parent:
        while not list((tmp_path / "c").glob("trials/*/record.json")):
            time.sleep(0.2)
        second = compare(file, tmp_path)
        parent.kill()
    assert second.returncode == 2
    assert "another 'sparsekit compare' is at work" in second.stderr


def test_what_is_damaged_is_told_and_made_again(file, tmp_path, undisturbed):
    shutil.copytree(undisturbed / "c", tmp_path / "c")
    [record, *_] = sorted((tmp_path / "c" / "runs").glob("*/record.json"))
    record.write_bytes(record.read_bytes()[:100])
    done = compare(file, tmp_path)
    assert done.returncode == 1
    assert "is not a whole record" in " ".join(done.stdout.split())
    assert compare(file, tmp_path, "--retry-failed").returncode == 0
    assert csv(tmp_path) == csv(undisturbed)


def test_a_real_server_is_told_of_a_parent_and_its_runs(file, tmp_path):
    from mlflow import MlflowClient

    port = 5000 + os.getpid() % 1000
    uri = f"http://127.0.0.1:{port}"
    store = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "a")]
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
            *store,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as server:
        try:
            _wait_for(uri)
            done = subprocess.run(
                command(file, tmp_path, "--tracking-uri", uri), capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            assert "tracking:" not in done.stdout
            client = MlflowClient(uri)
            runs = client.search_runs([client.get_experiment_by_name("sparsekit").experiment_id])
            [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
            assert sum(run.data.tags.get("mlflow.parentRunId") == parent.info.run_id for run in runs) == 12
            files = {file.path for file in client.list_artifacts(parent.info.run_id)}
            assert {"plan.json", "report.html", "results.csv"} <= files
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def _wait_for(uri):
    import urllib.request

    for _ in range(240):
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"no server at {uri}")
