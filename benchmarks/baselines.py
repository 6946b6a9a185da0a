"""The baselines on ResNet-20: tuning of their damping, and the table of docs/results.md.

    python benchmarks/baselines.py --data-dir CIFAR10 --checkpoint resnet20.th --output results
    python benchmarks/baselines.py … --tune

One process for each method and seed, so that peak memory is its own; one estimate of the curvature in it for all
dampings, compensations and sparsities. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jobs import job, spread

from sparsekit import Objective, ParameterSpace
from sparsekit.machine import peak_memory
from sparsekit.methods.interfaces import measure
from sparsekit.methods.schedules import plan
from sparsekit.pruning.events import StepCompleted
from sparsekit.pruning.pruner import Pruner
from sparsekit.registry.installed import load_registry
from sparsekit.runs.settings import merge, resolve

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)
GRID = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
HOW = ("independent", "joint")

#: name -> (estimator, saliency). Rows of one example each, the same number for every method.
EQUAL: dict[str, tuple[dict[str, Any], Any]] = {
    "obs": ({"name": "obs", "examples": 1024}, "obs"),
    "obs, greedy": ({"name": "obs", "examples": 1024}, {"name": "obs-greedy", "block_size": 50}),
    "woodfisher": ({"name": "woodfisher", "examples": 1024}, "obs"),
    "mfac": ({"name": "mfac", "examples": 1024}, "obs"),
    "fishleg": ({"name": "fishleg", "examples": 1024, "auxiliary_steps": 0}, "obs"),
    "fishleg, greedy": (
        {"name": "fishleg", "examples": 1024, "auxiliary_steps": 0},
        {"name": "obs-greedy", "block_size": 50},
    ),
}
#: γ as published for rows of one example.
PUBLISHED_DAMPING = {"obs": 1e-7, "obs, greedy": 1e-8, "woodfisher": 1e-5, "mfac": 1e-5}
#: γ by compensation, the best of GRID on the tuning half by the mean accuracy over LEVELS (--tune).
TUNED: dict[str, dict[str, float]] = {
    "obs": {"independent": 1e-4, "joint": 1e-5},
    "obs, greedy": {"independent": 1e-5, "joint": 1e-5},
    "woodfisher": {"independent": 1e-7, "joint": 1e-5},
    "mfac": {"independent": 1e-7, "joint": 1e-7},
    "fishleg": {"independent": 1e-3, "joint": 1e-4},
    "fishleg, greedy": {"joint": 3e-5},  # of 3e-5 and 1e-4 alone
}
#: As published, but in one cut: preset -> the method it belongs to.
PRESETS = {"obert": "obs", "cap": "obs, greedy", "woodfisher-resnet20": "woodfisher", "mfac": "mfac"}

#: As many of the published rows as there are images here, 30,000.
FEWER = {"cap": {"examples": 234 * 128}}


def cuts(options: argparse.Namespace, settings: dict[str, Any], dampings: dict[str, list[float]]) -> dict[str, Any]:
    """One estimate, then every damping and compensation at every level: accuracies, seconds, peak memory."""
    task = {"name": "cifar10", "data_dir": options.data_dir, "checkpoint": options.checkpoint}
    run = resolve({"task": task, "schedule": "one-shot", **settings}, load_registry())
    dataset, given = run.task.build(), run.estimator.settings
    model = dataset.model()
    space = ParameterSpace.of(model)
    estimator = run.estimator.build(space)
    draw = torch.Generator().manual_seed(options.seed)
    batches = list(dataset.batches("train", batch_size=given.batch_size, limit=given.examples, generator=draw))
    started = time.perf_counter()
    estimator.update(Objective(model, dataset.likelihood, batches, space), generator=draw)
    seconds = {"curvature": time.perf_counter() - started}
    limit = 2000 if options.tune else None  # enough to tell decades of damping apart
    judged = list(dataset.batches(options.split, batch_size=100, limit=limit))
    steps = [dataclasses.replace(s, refresh=False) for s in plan(LEVELS, run.schedule.build(), independent=True)]
    out: dict[str, Any] = {"accuracy": {}, "increase": {}}
    for how, values in dampings.items():
        for gamma in values:
            estimator.inverse = partial(type(estimator).inverse, estimator, gamma)
            compensation = run.settings.compensation.model_copy(update={"how": how})
            pruner = Pruner(
                model=model,
                space=space,
                likelihood=dataset.likelihood,
                estimator=estimator,
                saliency=run.saliency.build(),
                pattern=run.pattern.build(),
                compensation=compensation,
                steps=steps,
                calibration=lambda generator: (),
                measure=lambda network: measure(network, dataset.likelihood, judged),
            )
            pruner.state.dense = {}
            try:
                done = [event for event in pruner.run() if isinstance(event, StepCompleted)]
            except Exception as error:
                out["accuracy"][f"{how} {gamma:g}"] = str(error)
                continue
            finally:
                model.load_state_dict(pruner._dense)
            out["accuracy"][f"{how} {gamma:g}"] = [event.pruned["accuracy"] for event in done if event.pruned]
            seconds[f"removal {how} {gamma:g}"] = sum(event.seconds["removal"] for event in done)
    return out | {"seconds": seconds, "peak_memory_bytes": peak_memory(model)}


def jobs(tune: bool) -> dict[str, tuple[dict[str, Any], dict[str, list[float]]]]:
    """Name -> (settings of a run, dampings by compensation)."""
    found: dict[str, tuple[dict[str, Any], dict[str, list[float]]]] = {}
    for name, (estimator, saliency) in EQUAL.items():
        if tune:
            dampings = {how: list(GRID) for how in HOW}
        else:
            published = [PUBLISHED_DAMPING[name]] if name in PUBLISHED_DAMPING else []
            dampings = {how: sorted({*published, tuned}) for how, tuned in TUNED[name].items()}
        found[name] = ({"estimator": estimator, "saliency": saliency}, dampings)
    if not tune:
        registry = load_registry()
        for preset in PRESETS:
            settings = registry.get("preset", preset).settings
            gamma = settings["estimator"]["damping"]
            kept = {key: settings[key] for key in ("estimator", "saliency") if key in settings}
            kept = merge(kept, {"estimator": FEWER.get(preset, {})})
            found[f"preset {preset}"] = (kept, {how: [gamma] for how in HOW})
    return found


def main() -> None:
    """Do what is not yet on disk, each job in a process of its own, then print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--output", default="results", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tune", action="store_true", help="every damping of the grid on the tuning half, one seed")
    parser.add_argument("--only", nargs="*", help="methods and presets, by name")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.split = "tuning" if options.tune else "reporting"
    every = jobs(options.tune)
    if options.job:
        settings, dampings = every[options.job]
        print(json.dumps(cuts(options, settings, dampings)))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for name in options.only or every:
        for seed in range(1 if options.tune else options.seeds):
            path = options.output / f"baselines-{options.split}-{name.replace(', ', '-')}-{seed}.json"
            done = job(path, f"{name}, seed {seed}", "--job", name, "--seed", str(seed))
            found.setdefault(name, []).append(done)
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, {options.split} half\n")
    print(f"| | γ | {' | '.join(f'{100 * s:g} %' for s in LEVELS)} | curvature s | removal s | peak MiB |")
    print("|---|---|" + "---|" * (len(LEVELS) + 3))
    for name, runs in found.items():
        for key in runs[0]["accuracy"]:
            how, gamma = key.split()
            if any(isinstance(run["accuracy"][key], str) for run in runs):
                print(f"| {name}, {how} | {gamma} | {runs[0]['accuracy'][key]} |")
                continue
            cells = [spread([100 * run["accuracy"][key][level] for run in runs]) for level in range(len(LEVELS))]
            took = [statistics.mean(run["seconds"][what] for run in runs) for what in ("curvature", f"removal {key}")]
            peak = max(run["peak_memory_bytes"] for run in runs) / 2**20
            print(f"| {name}, {how} | {gamma} | {' | '.join(cells)} | {took[0]:.0f} | {took[1]:.0f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
