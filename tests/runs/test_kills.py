"""A run that is killed at a random moment: the same command again ends right, or says in one sentence why not."""

import json
import subprocess
import sys

import pytest

# A process that has imported everything forks one for each run, so that a hundred kills cost no hundred imports. It
# computes nothing itself: threads that computed once do not survive a fork.
HARNESS = """
import hashlib, json, os, random, shutil, signal, sys, time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import mlflow.tracking
from safetensors.torch import load_file
import sparsekit.tasks.digits
from sparsekit.errors import SparsekitError
from sparsekit.runs.run import execute
from sparsekit.registry.installed import load_registry
from sparsekit.runs.settings import resolve

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
REGISTRY = load_registry()


def run(output, tracked, said, **how):
    raw = {
        "estimator": {"name": "diagonal", "examples": 64}, "sparsity": [0.5, 0.8], "steps": 2,
        "finetune": {"epochs": 0.1}, "output": str(output), "tracking": {"enabled": tracked},
    }
    try:
        outcome = execute(resolve(raw, REGISTRY), REGISTRY, **how)
        # of the numbers: the order of a file's metadata is the library's own
        weights = {name: tensor.tolist() for name, tensor in load_file(outcome.path / "weights.safetensors").items()}
        whole = hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()
        told = whole if outcome.record.status == "finished" else "not finished"
    except SparsekitError as error:
        told = f"refused: {error}"
    except BaseException as error:
        told = f"crashed: {type(error).__name__}: {error}"
    said.write_text(told)


def forked(*given, **how):
    child = os.fork()
    if child == 0:
        try:
            run(*given, **how)
        finally:
            os._exit(0)
    return child


said = folder / "said"
begun = time.perf_counter()
os.waitpid(forked(folder / "right", False, said), 0)
plain = time.perf_counter() - begun
right, outcomes, draw = said.read_text(), [], random.Random(0)
begun = time.perf_counter()
os.waitpid(forked(folder / "tracked", True, said), 0)
lasts = {False: plain, True: time.perf_counter() - begun}
for kill in range(kills):
    fresh, tracked = kill % 3 == 2, kill % 3 == 1
    output = folder / str(kill)
    if fresh:
        shutil.copytree(folder / "right", output)
    child = forked(output, tracked, folder / "unheard", fresh=fresh)
    time.sleep(draw.uniform(0, 1.1 * lasts[tracked]))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said.write_text("nothing")
    os.waitpid(forked(output, tracked, said, resume=True), 0)
    outcome = said.read_text()
    if outcome.startswith("refused"):  # and then it can be started again
        os.waitpid(forked(output, tracked, said, fresh=True), 0)
        outcome = "refused" if said.read_text() == right else f"{outcome}; afresh: {said.read_text()}"
    outcomes.append("right" if outcome == right else outcome)
    shutil.rmtree(output)
print(json.dumps(outcomes))
"""


@pytest.mark.slow
def test_a_hundred_kills_are_never_silent(tmp_path, cache):
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, str(tmp_path), "102"], capture_output=True, text=True, check=True, timeout=3000
    )
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert len(outcomes) == 102
    assert set(outcomes) <= {"right", "refused"}, outcomes
    assert outcomes.count("right") > 50
