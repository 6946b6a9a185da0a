"""Refining the curvature along a gradual run against estimating it anew, at equal and at a quarter of the cost.

    python benchmarks/refinement.py digits --output results
    python benchmarks/refinement.py cifar10 --output results --data-dir CIFAR10 --checkpoint resnet20.th

FishLeg, cubic schedule to 95 %, fine-tuned after each of eight cuts; the same fine-tuning and seeds in every row.
"Anew": decay 0, each cut is estimated from its own examples alone. "Refined": moments of earlier cuts are carried on.
Shown after each cut: the loss increase on the calibration examples (measured, and predicted), the loss on the reporting
half, both as mean (range) over seeds. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

from jobs import spread

from sparsekit.registry.installed import load_registry
from sparsekit.runs.run import execute
from sparsekit.runs.schema import RunRecord
from sparsekit.runs.settings import merge, resolve

STEPS = 8


def rows(examples: int) -> dict[str, dict[str, Any]]:
    quarter = examples // 4
    return {
        f"anew, {examples} examples": {"examples": examples, "decay": 0.0},
        f"anew, {quarter} examples": {"examples": quarter, "decay": 0.0},
        f"refined, {examples} examples, decay 0.2": {"examples": examples, "decay": 0.2},
        f"refined, {quarter} examples, decay 0.5": {"examples": quarter, "decay": 0.5},
        f"refined, {quarter} examples, decay 0.7": {"examples": quarter, "decay": 0.7},
        f"refined, {quarter} examples, decay 0.7, auxiliary steps": {
            "examples": quarter,
            "decay": 0.7,
            "auxiliary_steps": 20,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["digits", "cifar10"])
    parser.add_argument("--output", default="results")
    parser.add_argument("--data-dir")
    parser.add_argument("--checkpoint")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=1.0, help="of fine-tuning after each cut")
    options = parser.parse_args()
    registry = load_registry()
    small = options.task == "digits"
    base = {
        "task": {"name": options.task, "data_dir": options.data_dir, "checkpoint": options.checkpoint},
        "schedule": "cubic",
        "steps": STEPS,
        "sparsity": [0.95],
        "finetune": {"epochs": options.epochs},
        "output": options.output,
        "tracking": {"enabled": False},
    }
    found: dict[str, list[RunRecord]] = {}
    for name, estimator in rows(1024).items():
        for seed in range(options.seeds):
            print(f"{name}, seed {seed} …", file=sys.stderr, flush=True)
            given = {"seed": seed, "estimator": {"name": "fishleg", "auxiliary_steps": 0, **estimator}}
            settings = merge(base, given, {"task": {"seed": seed}} if small else {})
            found.setdefault(name, []).append(execute(resolve(settings, registry), registry, resume=True).record)
    for quantity in ("measured_increase", "predicted_increase", "pruned", "finetuned"):
        first = next(iter(found.values()))[0].steps
        removed = [f"{100 * step.removed / first[-1].removed * 0.95:.0f} %" for step in first]
        print(f"\n| {quantity} | {' | '.join(removed)} | curvature s |\n|---|" + "---|" * (STEPS + 1))
        for name, runs in found.items():
            cells = []
            for index in range(STEPS):
                values = [getattr(run.steps[index], quantity) for run in runs]
                cells.append(spread([v["loss"] if isinstance(v, dict) else v for v in values], digits=4))
            seconds = statistics.mean(run.seconds["curvature"] for run in runs)
            print(f"| {name} | {' | '.join(cells)} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
