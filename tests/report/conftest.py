"""Comparisons on disk, made of records that no run has written."""

import math
import random

import pytest

from sparsekit.compare.plan import FAILURES, PLAN, TUNING, Failure, Plan, PlannedRun, Trial, Tuned, Tuning, write
from sparsekit.runs.directory import RunDirectory
from sparsekit.runs.schema import LevelRecord, RunRecord, StepRecord

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
LAYERS = {"conv1.weight": 1000.0, "conv2.weight": 4000.0, "linear.weight": 5000.0, "head.weight": 500.0}
DENSE = {"loss": 0.05, "accuracy": 0.98}


def step_record(index, sparsity, **changes):
    values = {
        "index": index,
        "sparsity": sparsity,
        "removed": int(10_500 * sparsity),
        "refreshed": index == 0,
        "curvature": {},
        "damping": 1e-4,
        "predicted_increase": 0.01,
        "measured_increase": 0.02,
        "iterations": 0,
        "residual": 0.0,
        "pruned": None,
        "finetuned": None,
        "seconds": {"curvature": 1.0},
    }
    return StepRecord(**{**values, **changes})


def level_record(sparsity, accuracy, **changes):
    loss = 0.05 - math.log(max(accuracy, 0.01))
    values = {
        "sparsity": sparsity,
        "achieved": sparsity,
        "achieved_total": 0.99 * sparsity,
        "pruned": {"loss": loss, "accuracy": accuracy},
        "finetuned": None,
        "predicted_increase": loss / 3,
        "measured_increase": loss / 2,
        "reconstructed_increase": 0.0,
        "layer_sparsity": dict.fromkeys(LAYERS, sparsity),
    }
    return LevelRecord(**{**values, **changes})


def run_record(axes, seed, levels, **changes):
    method = axes["method"]
    settings = {
        "task": {"name": axes["task"]},
        "estimator": {"name": "identity"} if method == "magnitude" else {"name": method, "examples": 256},
        "saliency": {"name": "magnitude" if method == "magnitude" else "obs"},
        "compensation": {"how": axes["compensation"]},
        "reconstruction": {"how": axes["reconstruction"]},
        "split": "reporting",
        "seed": seed,
    }
    values = {
        "key": "0" * 64,
        "task": axes["task"],
        "estimator": settings["estimator"]["name"],
        "settings": settings,
        "identity": {"weights": "ab" * 32, "data": "cd" * 32},
        "started": f"2026-01-01T10:0{seed}:00+00:00",
        "finished": f"2026-01-01T11:0{seed}:00+00:00",
        "machine": {"python": "3.11", "torch": "2.6", "device": "cpu: x86_64", "threads": "1"},
        "plugins": [{"name": "builtins", "distribution": "sparsekit", "version": "0.1.0"}],
        "parameters": {"prunable": 10_500, "total": 10_600, "skipped": {}},
        "path": "independent",
        "dense": DENSE,
        "levels": levels,
        "steps": [step_record(0, 0.5)],
        "seconds": {"curvature": 2.0, "removal": 1.0, "total": 4.0},
        "peak_memory_bytes": 512 * 2**20,
        "status": "finished",
    }
    return RunRecord(**{**values, **changes})


def axes_of(method, compensation="none", reconstruction="none", task="digits", **more):
    fixed = {"task": task, "method": method, "compensation": compensation, "reconstruction": reconstruction}
    return {**fixed, "pattern": "unstructured", "schedule": "one-shot", **more}


class Desk:
    """Puts a comparison together, run by run, and onto the disk."""

    def __init__(self, directory):
        self.directory, self.runs, self.plan = directory, [], {}
        self.tuning = None

    def run(self, axes, seed, record=None, failure=None, **planned):
        name = f"runs/{'-'.join(axes.values())}-{seed}".replace(":", "_")
        self.runs.append(
            PlannedRun(axes=axes, seed=seed, directory=name, settings=planned.pop("settings", {}), **planned)
        )
        if record is not None:
            RunDirectory(self.directory / name).write(record)
        if failure is not None:
            write(failure, self.directory / FAILURES / f"{name.removeprefix('runs/')}.json")

    def point(self, axes, *accuracies, sparsity=0.9):
        """A run for each accuracy, seeds from 0."""
        for seed, accuracy in enumerate(accuracies):
            self.run(axes, seed, run_record(axes, seed, [level_record(sparsity, accuracy)]))

    def done(self):
        values = {
            "name": "small",
            "file": {"name": "small", "seeds": 3},
            "reference": "magnitude",
            "warnings": [],
            "seeds_vary": ["calibration examples"],
            "seeds_share": ["the dense network"],
            "multiply_adds": {},
        }
        write(Plan(**{**values, **self.plan}, runs=self.runs), self.directory / PLAN)
        if self.tuning is not None:
            write(self.tuning, self.directory / TUNING)
        return self.directory


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path / "comparison")


def _accuracy(draw, method, compensation, reconstruction, sparsity):
    """Falls where a sigmoid does, the later the better the arms are."""
    place = {"magnitude": 2.0, "diagonal": 2.5, "fishleg": 3.2, "obs": 2.9}[method]
    place += {"none": 0.0, "joint": 0.5}[compensation] + {"none": 0.0, "layerwise": 0.9, "fisher": 1.0}[reconstruction]
    if reconstruction != "none":
        place -= {"none": 0.0, "joint": 0.5}[compensation]
    kept = -math.log(1 - sparsity)
    return round(0.1 + 0.88 / (1 + math.exp(3 * (kept - place))) + draw.gauss(0, 0.004), 4)


def _level(draw, method, compensation, reconstruction, sparsity):
    accuracy = _accuracy(draw, method, compensation, reconstruction, sparsity)
    slope = {"magnitude": 0.2, "diagonal": 0.15, "obs": 0.1, "fishleg": 0.05}[method]
    uneven = {name: min(1.0, sparsity * (0.6 + slope * i)) for i, name in enumerate(LAYERS)}
    changes = {"layer_sparsity": uneven}
    if method == "magnitude":
        changes |= {"predicted_increase": math.nan}
    if reconstruction != "none":
        changes |= {"reconstructed_increase": -0.01}
    return level_record(sparsity, accuracy, **changes)


ARMS = [("none", "none"), ("joint", "none"), ("none", "layerwise"), ("joint", "layerwise"), ("none", "fisher")]
ARMS += [("joint", "fisher")]


def whole(directory):
    """Four methods by compensation and reconstruction, three seeds, five sparsities; some of what goes wrong."""
    desk, draw = Desk(directory), random.Random(0)
    for method in ("magnitude", "diagonal", "obs", "fishleg"):
        for compensation, reconstruction in ARMS:
            if method == "magnitude" and compensation != "none":
                continue
            for seed in (0, 1, 2):
                _one(desk, draw, axes_of(method, compensation, reconstruction), seed)
    for method in ("magnitude", "fishleg"):
        for seed in (0, 1, 2):
            _gradual(desk, draw, axes_of(method, task="cifar10", schedule="cubic"), seed)
    desk.plan = {
        "warnings": ["two seeds are fewer than three <b>"],
        "seeds_share": ["the dense network: bands show calibration noise only"],
        "multiply_adds": {"digits": LAYERS},
    }
    trials = [Trial(damping=10.0**-k, value=0.9 - k / 100) for k in (1, 2)]
    trials.append(Trial(damping=10.0, value=-math.inf, cause="not positive definite"))
    tuned = [Tuned(axes={"task": "digits", "method": m}, trials=trials, damping=0.1) for m in ("obs", "fishleg")]
    desk.tuning = Tuning(objective="accuracy at 90 % on the tuning half", tuned=tuned, untuned=["magnitude"])
    return desk.done()


def _one(desk, draw, axes, seed):
    method, compensation, reconstruction = axes["method"], axes["compensation"], axes["reconstruction"]
    levels = [_level(draw, method, compensation, reconstruction, sparsity) for sparsity in SPARSITIES]
    cost = {"magnitude": 0.0, "diagonal": 1.5, "obs": 6.0, "fishleg": 20.0}[method] + draw.random() * (
        method != "magnitude"
    )
    seconds = {"curvature": cost, "removal": 1.0, "reconstruction": 5.0, "total": cost + 8.0}
    record = run_record(axes, seed, levels, seconds=seconds)
    departures = {"estimator.damping": 0.1} if method in ("obs", "fishleg") else {}
    case = (method, compensation, reconstruction, seed)
    if case == ("fishleg", "joint", "fisher", 2):
        failure = Failure(
            cause="the run's memory ran out", details="Traceback: <here>", when="2026-01-01T10:00:00+00:00"
        )
        desk.run(axes, seed, failure=failure, departures=departures)
        return
    if case == ("obs", "joint", "fisher", 2):
        record = record.model_copy(update={"status": "running", "levels": levels[:2]})
    if case == ("obs", "joint", "none", 1):
        record = record.model_copy(update={"degraded": ["step 0: exact compensation stopped after 100 products"]})
    if case[0] == "fishleg" and compensation == "joint":
        record = record.model_copy(update={"steps": [step_record(0, 0.5, curvature={"shared/seconds": 20.0})]})
    desk.run(axes, seed, record, departures=departures)


def _gradual(desk, draw, axes, seed):
    steps, levels = [], []
    for i, sparsity in enumerate(SPARSITIES):
        accuracy = _accuracy(draw, axes["method"], "none", "none", sparsity)
        tuned = {"loss": 0.2, "accuracy": min(0.97, accuracy + 0.1)}
        levels.append(level_record(sparsity, accuracy, finetuned=tuned))
        steps.append(step_record(i, sparsity, pruned=levels[-1].pruned, finetuned=tuned))
    parameters = {"prunable": 268_336, "total": 272_474, "skipped": {}}
    record = run_record(axes, seed, levels, path="sequential", steps=steps, parameters=parameters)
    desk.run(axes, seed, record)


@pytest.fixture(scope="session")
def comparison(tmp_path_factory):
    """The directory of a whole comparison; not to be written to."""
    return whole(tmp_path_factory.mktemp("whole") / "comparison")


@pytest.fixture(name="axes_of")
def _axes_of():
    return axes_of


@pytest.fixture(name="level_record")
def _level_record():
    return level_record


@pytest.fixture(name="run_record")
def _run_record():
    return run_record


@pytest.fixture(name="step_record")
def _step_record():
    return step_record
