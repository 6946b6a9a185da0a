"""Mask, compensation and reconstruction on ResNet-20: which part of the accuracy is owed to which.

    python benchmarks/reconstruction.py one-cut --data-dir CIFAR10 --checkpoint resnet20.th --output results
    python benchmarks/reconstruction.py sub-steps …
    python benchmarks/reconstruction.py finetuning …
    python benchmarks/reconstruction.py cost …

No fine-tuning but where it is named, no batch-norm recalibration, reporting half. One cut: a process for each mask and
seed, whose curvature is taken once. Sub-steps and fine-tuning: one path through the levels, curvature refreshed and
layers fitted at each cut. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jobs import job, spread

from sparsekit import Mask, Objective, ParameterSpace
from sparsekit.machine import peak_memory
from sparsekit.methods.interfaces import ReconstructionSettings
from sparsekit.methods.schedules import plan
from sparsekit.pruning.events import StepCompleted
from sparsekit.pruning.pruner import Pruner
from sparsekit.reconstruction.fit import Reconstruction
from sparsekit.registry.installed import load_registry
from sparsekit.runs.run import execute
from sparsekit.runs.settings import merge, resolve

LEVELS = (0.5, 0.7, 0.8, 0.9, 0.95)
HOW = ("none", "layerwise", "fisher")

ABSOLUTE = {"damping_scale": "absolute"}
GREEDY = {"name": "obs-greedy", "block_size": 50}
FISHLEG = {"name": "fishleg", "damping": 1e-4, **ABSOLUTE}

#: mask -> (settings, compensations). Dampings as tuned for joint removal without reconstruction (baselines.py).
MASKS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "magnitude": ({"estimator": "identity", "saliency": "magnitude"}, ("none",)),
    "diagonal": ({"estimator": "diagonal"}, ("none",)),
    "obs": ({"estimator": {"name": "obs", "damping": 1e-5, **ABSOLUTE}}, ("none", "joint")),
    "fishleg": ({"estimator": FISHLEG}, ("none", "joint")),
    "fishleg, greedy": ({"estimator": FISHLEG, "saliency": GREEDY}, ("none", "joint")),
    "fishleg, greedy by rows": (  # γ as tuned for greedy scores, block size chosen on the tuning half
        {"estimator": {**FISHLEG, "damping": 3e-5}, "saliency": {"name": "obs-greedy", "block_size": 576}},
        ("none", "joint"),
    ),
    "layer-wise obs, uniform": (
        {"estimator": "obs-layerwise", "saliency": {"name": "obs-greedy", "block_size": 576}, "pattern": "uniform"},
        ("none", "joint"),
    ),
    "layer-wise obs, equal error": (
        {
            "estimator": {"name": "obs-layerwise", "allocation": "error"},
            "saliency": {"name": "obs-greedy", "block_size": 576},
        },
        ("none", "joint"),
    ),
    "layer-wise obs, Fisher": (
        {
            "estimator": {"name": "obs-layerwise", "allocation": "fisher"},
            "saliency": {"name": "obs-greedy", "block_size": 576},
        },
        ("none", "joint"),
    ),
}

#: Rows of the table of sub-steps: mask, compensation, reconstruction, sub-steps a level.
PATHS = [
    ("layer-wise obs, Fisher", "joint", "fisher", 4),
    ("fishleg, greedy by rows", "joint", "fisher", 4),
    ("fishleg, greedy", "joint", "fisher", 4),
    ("magnitude", "none", "fisher", 4),
    ("fishleg", "joint", "fisher", 4),
    ("fishleg", "joint", "none", 4),
    ("fishleg", "joint", "layerwise", 4),
    ("obs", "joint", "fisher", 4),
    ("fishleg, greedy", "joint", "fisher", 8),
    ("fishleg, greedy", "joint", "fisher", 16),
]


def base(options: argparse.Namespace) -> dict[str, Any]:
    task = {"name": "cifar10", "data_dir": options.data_dir, "checkpoint": options.checkpoint}
    return {"task": task, "schedule": "one-shot", "sparsity": list(LEVELS), "finetune": {"epochs": 0}}


def one_cut(options: argparse.Namespace) -> dict[str, Any]:
    """One estimate, then every compensation and reconstruction at every level."""
    settings, compensations = MASKS[options.mask]
    run = resolve({**base(options), **settings}, load_registry())
    dataset, given = run.task.build(), run.estimator.settings
    model = dataset.model()
    space = ParameterSpace.of(model)
    estimator = run.estimator.build(space)

    def draw(purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * options.seed + purpose)

    batches = list(dataset.batches("train", batch_size=given.batch_size, limit=given.examples, generator=draw(0)))
    started = time.perf_counter()
    estimator.update(Objective(model, dataset.likelihood, batches, space), generator=draw(1))
    seconds = time.perf_counter() - started
    inverse = estimator.inverse()
    estimator.inverse = lambda: inverse
    steps = [dataclasses.replace(s, refresh=False) for s in plan(LEVELS, run.schedule.build(), independent=True)]
    saliency = run.saliency.build()
    saliency.score = _once(saliency.score)  # of the dense weights, in every row
    rows = {}
    for compensation, how in product(compensations, HOW):
        fitting = ReconstructionSettings(how=how)
        anchors = list(
            dataset.batches("train", batch_size=fitting.batch_size, limit=fitting.examples, generator=draw(2))
        )
        pruner = Pruner(
            model=model,
            space=space,
            likelihood=dataset.likelihood,
            estimator=estimator,
            saliency=saliency,
            pattern=run.pattern.build(),
            compensation=run.settings.compensation.model_copy(update={"how": compensation}),
            steps=steps,
            calibration=lambda generator: batches,
            measure=lambda network: dataset.measure(network, options.split),
            reconstruction=fitting,
            anchors=lambda generator, anchors=anchors: anchors,
        )
        pruner.state.dense = {}
        done = [event for event in pruner.run() if isinstance(event, StepCompleted)]
        model.load_state_dict(pruner._dense)
        rows[f"{compensation}, {how}"] = {
            "accuracy": [event.pruned["accuracy"] for event in done if event.pruned],
            "removal": statistics.mean(event.seconds["removal"] for event in done),
            "reconstruction": statistics.mean(event.seconds.get("reconstruction", 0.0) for event in done),
        }
    return {"rows": rows, "curvature": seconds, "peak": peak_memory(model)}


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    found: list[Any] = []

    def first(*given: Any) -> Any:
        found.extend([] if found else [function(*given)])
        return found[0]

    return first


def table_of_one_cut(options: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, Any]]] = {}
    for seed, mask in product(range(options.seeds), options.only or MASKS):
        path = (
            options.output / f"reconstruction-{options.split}-{mask.replace(', ', '-').replace(' ', '-')}-{seed}.json"
        )
        done = job(path, f"{mask}, seed {seed}", "--mask", mask, "--seed", str(seed))
        found.setdefault(mask, []).append(done)
    columns = ["mask", "compensation, reconstruction", *(f"{100 * s:g} %" for s in LEVELS)]
    columns += ["curvature s", "removal s", "reconstruction s", "peak MiB"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for mask, runs in found.items():
        for key in runs[0]["rows"]:
            rows = [run["rows"][key] for run in runs]
            cells = [spread([100 * row["accuracy"][level] for row in rows]) for level in range(len(LEVELS))]
            cells += [f"{statistics.mean(run['curvature'] for run in runs):.0f}"]
            cells += [f"{statistics.mean(row[what] for row in rows):.0f}" for what in ("removal", "reconstruction")]
            print(f"| {mask} | {key} | {' | '.join(cells)} | {max(run['peak'] for run in runs) / 2**20:.0f} |")


def table_of_paths(options: argparse.Namespace) -> None:
    registry = load_registry()
    columns = ["mask, compensation, reconstruction", "sub-steps", *(f"{100 * s:g} %" for s in LEVELS)]
    print(f"| {' | '.join([*columns, 'curvature s', 'removal s', 'reconstruction s', 'peak MiB'])} |")
    print("|" + "---|" * (len(columns) + 4))
    for mask, compensation, how, substeps in PATHS:
        if options.only and f"{mask}, {compensation}, {how}, {substeps}" not in options.only:
            continue
        runs = []
        for seed in range(options.seeds):
            given = {"compensation": compensation, "reconstruction": how, "substeps": substeps, "seed": seed}
            given |= {"output": str(options.output), "split": options.split, "tracking": {"enabled": False}}
            settings = merge(base(options), MASKS[mask][0], given)
            runs.append(execute(resolve(settings, registry), registry, resume=True).record)
        accuracies = zip(*([100 * level.pruned["accuracy"] for level in run.levels] for run in runs), strict=True)
        cells = [spread(list(values)) for values in accuracies]
        for what in ("curvature", "removal", "reconstruction"):
            cells.append(f"{statistics.mean(run.seconds.get(what, 0.0) for run in runs):.0f}")
        peak = max(run.peak_memory_bytes for run in runs) / 2**20
        print(f"| {mask}, {compensation}, {how} | {substeps} | {' | '.join(cells)} | {peak:.0f} |", flush=True)


def finetuning(options: argparse.Namespace) -> None:
    """The same masks, with and without reconstruction, then one epoch: does the head start last?"""
    registry = load_registry()
    print("| mask, compensation, reconstruction | learning rate | 80 %, before → after | 90 %, before → after |")
    print("|---|---|---|---|")
    for (mask, compensation), how, rate in product(
        (("magnitude", "none"), ("fishleg", "joint")), HOW, options.learning_rates
    ):
        if options.only and mask not in options.only:
            continue
        cells = []
        for sparsity in (0.8, 0.9):
            pairs = []
            for seed in range(options.seeds):
                given = {"compensation": compensation, "reconstruction": how, "seed": seed, "sparsity": [sparsity]}
                given |= {"output": str(options.output), "split": options.split, "tracking": {"enabled": False}}
                given |= {"finetune": {"epochs": 1, "learning_rate": rate}}
                settings = merge(base(options), MASKS[mask][0], given)
                [level] = execute(resolve(settings, registry), registry, resume=True).record.levels
                pairs.append([100 * (level.finetuned or {})["accuracy"], 100 * level.pruned["accuracy"]])
            after, before = (spread(list(values)) for values in zip(*pairs, strict=True))
            cells.append(f"{before} → {after}")
        print(f"| {mask}, {compensation}, {how} | {rate:g} | {' | '.join(cells)} |", flush=True)


def cost(options: argparse.Namespace) -> None:
    """Reconstruction from 1,024 images in plain training steps of batch 128, by the processor's seconds, turn about."""
    run = resolve(base(options), load_registry())
    dataset = run.task.build()
    dense = dataset.model()
    space = ParameterSpace.of(dense)
    weights = space.read(dense)
    mask = Mask(weights.abs() > weights.abs().quantile(0.8))
    batches = list(dataset.batches("train", batch_size=64, limit=1024))
    inputs, targets = (torch.cat(parts) for parts in zip(*batches[:2], strict=True))
    optimiser = torch.optim.SGD(dense.parameters(), 0.0)

    def step() -> float:
        started = time.process_time()
        optimiser.zero_grad()
        dataset.likelihood.losses(dense(inputs), targets).mean().backward()
        optimiser.step()
        return time.process_time() - started

    def fit(how: str) -> float:
        model = deepcopy(dense)
        mask.apply(space, model)
        given = ReconstructionSettings(how=how)
        weighting = {i.name: torch.eye(i.shape[0])[None] for i in space.parameters} if how == "fisher" else None
        started = time.process_time()
        for _ in Reconstruction(model, dense, space, mask, batches, given, weighting=weighting).run():
            pass
        return time.process_time() - started

    step()
    ratios: dict[str, list[float]] = {"layerwise": [], "fisher": []}
    for _ in range(3):
        for how, found in ratios.items():
            plain = statistics.median(step() for _ in range(5))
            found.append(fit(how) / plain)
    for how, found in ratios.items():
        print(f"{how}: {statistics.median(found):.1f} ({min(found):.1f}–{max(found):.1f}) plain training steps")


def main() -> None:
    """Do what is not yet on disk, then print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["one-cut", "sub-steps", "finetuning", "cost"])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--output", default="results", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", choices=["tuning", "reporting"], default="reporting")
    parser.add_argument("--only", nargs="*", help="masks; of sub-steps, rows as 'fishleg, joint, fisher, 4'")
    parser.add_argument("--learning-rates", nargs="*", type=float, default=[0.01])
    parser.add_argument("--mask", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.mask:
        print(json.dumps(one_cut(options)))
    else:
        work = {"one-cut": table_of_one_cut, "sub-steps": table_of_paths, "finetuning": finetuning, "cost": cost}
        work[options.what](options)


if __name__ == "__main__":
    main()
