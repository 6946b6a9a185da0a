"""The tables of docs/results.md: runs what is not yet on disk, then prints Markdown.

    python benchmarks/tables.py digits --output results
    python benchmarks/tables.py resnet20 --output results --data-dir CIFAR10 --checkpoint resnet20.th
    python benchmarks/tables.py autoencoder --output results --data-dir MNIST
    python benchmarks/tables.py transformer --output results
    python benchmarks/tables.py autoencoder … --gradual
    python benchmarks/tables.py digits … --reconstruct layerwise

Each run has a process of its own, so that peak memory is its own. Interrupted, it goes on where it stopped: a finished
run is not done again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from jobs import spread

from sparsekit.registry.installed import load_registry
from sparsekit.runs.run import execute
from sparsekit.runs.schema import RunRecord
from sparsekit.runs.settings import merge, resolve

Row = tuple[str, dict[str, Any]]

DIGITS: list[Row] = [
    ("fishleg, joint", {"estimator": "fishleg"}),
    ("obs, joint", {"estimator": "obs"}),
    ("diagonal", {"estimator": "diagonal"}),
    ("magnitude", {"estimator": "identity"}),
    ("random", {"estimator": "identity", "saliency": "random"}),
]

ONE_SHOT = {"schedule": "one-shot"}
#: Damping chosen on the tuning half among 3e-5, 1e-4, 3e-4, 1e-3; independent updates ask for more.
FISHLEG = {"name": "fishleg", "examples": 2048, "damping": 1e-4, "damping_scale": "absolute"}
RESNET20: list[Row] = [
    ("magnitude", {**ONE_SHOT, "estimator": "identity", "compensation": "none"}),
    *(
        (f"obs, {how}", {**ONE_SHOT, "estimator": "obs", "compensation": how})
        for how in ("none", "independent", "joint")
    ),
    *(
        (
            f"fishleg, {how}",
            {**ONE_SHOT, "estimator": FISHLEG, "compensation": how},
        )
        for how in ("none", "independent", "joint")
    ),
    (
        "fishleg, independent, γ = 1e-3",
        {**ONE_SHOT, "estimator": {**FISHLEG, "damping": 1e-3}, "compensation": "independent"},
    ),
    ("fishleg, joint, 4 refreshes a level", {**ONE_SHOT, "estimator": "fishleg", "substeps": 4}),
]

#: Every estimator at its defaults, except where its rows of 2.8 million weights would not fit 6 GiB.
TRANSFORMER: list[Row] = [
    *((name, {"estimator": name}) for name in ("fishleg", "obs", "mfac", "woodfisher", "diagonal")),
    ("magnitude", {"estimator": "identity"}),
]
FEWER = {"mfac": 512, "woodfisher": 256}
AUTOENCODER: list[Row] = [
    (f"{name}, {FEWER[name]} examples", {"estimator": {"name": name, "examples": FEWER[name]}})
    if name in FEWER
    else (name, settings)
    for name, settings in TRANSFORMER
]


def record(settings: dict[str, Any]) -> RunRecord:
    """One run, or what is on disk of it."""
    registry = load_registry()
    return execute(resolve(settings, registry), registry, resume=True).record


def records(rows: Sequence[Row], base: dict[str, Any], seeds: Sequence[int]) -> Iterator[tuple[str, list[RunRecord]]]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for name, settings in rows:
            found = []
            for seed in seeds:
                own_network = {"task": {"seed": seed}} if base["task"]["name"].startswith("digits") else {}
                print(f"{name}, seed {seed} …", file=sys.stderr, flush=True)
                given = merge(base, settings, {"seed": seed}, own_network)
                found.append(processes.submit(record, given).result())
            yield name, found


def table(rows: Sequence[tuple[str, list[RunRecord]]], levels: Sequence[float], phase: str, metric: str) -> None:
    print(f"\n| {phase} | {' | '.join(f'{100 * s:g} %' for s in levels)} | curvature s | all s | peak MiB |")
    print("|---|" + "---|" * (len(levels) + 3))
    scale = 100.0 if metric == "accuracy" else 1.0
    for name, runs in rows:
        cells = []
        for index in range(len(levels)):
            results = [getattr(run.levels[index], phase) for run in runs]
            cells.append("–" if results[0] is None else spread([r[metric] for r in results], scale))
        seconds = [run.seconds.get("curvature", 0.0) for run in runs]
        totals = [run.seconds["total"] for run in runs]
        peak = max(run.peak_memory_bytes for run in runs) / 2**20
        print(
            f"| {name} | {' | '.join(cells)} | {statistics.mean(seconds):.0f} | {statistics.mean(totals):.0f} "
            f"| {peak:.0f} |",
            flush=True,
        )


def main() -> None:
    """Run and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["digits", "resnet20", "autoencoder", "transformer"])
    parser.add_argument("--output", default="results")
    parser.add_argument("--data-dir")
    parser.add_argument("--checkpoint")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", default="reporting", choices=["tuning", "reporting"])
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--reconstruct", default="none", choices=["none", "layerwise", "fisher"])
    parser.add_argument("--gradual", action="store_true", help="cubic, four cuts with an epoch after each, to 90 %%")
    options = parser.parse_args()
    seeds = range(options.seeds)
    base: dict[str, Any] = {"output": options.output, "tracking": {"enabled": False}, "split": options.split}
    levels, metric = [0.5, 0.7, 0.8, 0.9, 0.95], "accuracy"
    if options.what == "digits":
        rows = DIGITS
        base |= {"task": {"name": "digits"}, "schedule": "one-shot", "levels": "independent"}
    elif options.what == "autoencoder":
        rows, metric = AUTOENCODER, "loss"
        base |= {**ONE_SHOT, "task": {"name": "autoencoder", "data_dir": options.data_dir}, "finetune": {"epochs": 0}}
    elif options.what == "transformer":
        rows = TRANSFORMER
        base |= {**ONE_SHOT, "task": {"name": "digits-transformer"}, "finetune": {"epochs": 0}}
    else:
        levels, rows = [0.5, 0.6, 0.7, 0.8, 0.9], RESNET20
        base |= {"task": {"name": "cifar10", "data_dir": options.data_dir, "checkpoint": options.checkpoint}}
    if options.gradual:
        levels = [0.9]
        base |= {"schedule": "cubic", "steps": 4, "levels": "sequential", "finetune": {"epochs": 1}}
        rows = [  # 256 examples an estimate for all, as many as fit with every method
            (name.split(",")[0], merge(settings, {"estimator": {"examples": 256}} if name != "magnitude" else {}))
            for name, settings in rows
        ]
    base |= {"sparsity": levels, "reconstruction": options.reconstruct}
    if options.only:
        rows = [row for row in rows if options.only in row[0]]
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, {options.split} half")
    found = list(records(rows, base, seeds))
    dense = spread([run.dense[metric] for run in found[0][1]], 100.0 if metric == "accuracy" else 1.0)
    print(f"dense {metric}: {dense}")
    table(found, levels, "pruned", metric)
    if options.what == "digits" or options.gradual:
        table(found, levels, "finetuned", metric)


if __name__ == "__main__":
    main()
