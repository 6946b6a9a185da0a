"""What a comparison costs beside its work: planning, hashing, checkpoints, records, tracking, the report.

    python benchmarks/overhead.py --data-dir CIFAR10 --checkpoint resnet20.th --output results

One worker, one thread, tracked in a SQLite file. Work is what the records count by phase: curvature, removal,
reconstruction and measuring; everything else of the command's wall-clock time is the host's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import yaml

from sparsekit.compare.plan import Comparison

FILE = {
    "name": "overhead",
    "run": {
        "task": "cifar10",
        "schedule": "one-shot",
        "sparsity": [0.5, 0.7, 0.8, 0.9, 0.95],
        "finetune": {"epochs": 0},
    },
    "methods": {
        "fishleg": {"estimator": "fishleg"},
        "obs": {"estimator": "obs"},
        "magnitude": {"estimator": "identity", "saliency": "magnitude", "compensation": "none"},
    },
    "axes": {"reconstruction": ["none", "layerwise"]},
    "seeds": [0],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--output", default="results", type=Path)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "overhead.yaml"
    file.write_text(yaml.safe_dump(FILE))
    command = [sys.executable, "-m", "sparsekit", "compare", str(file), "--output", str(options.output)]
    command += ["--data-dir", options.data_dir, "--checkpoint", options.checkpoint, "--workers", "1"]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr)
    wall = time.perf_counter() - started
    records = Comparison.load(options.output / "overhead").records.values()
    phases: dict[str, float] = {}
    for record in records:
        for phase, seconds in record.seconds.items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    total, prepare = phases.pop("total"), phases.pop("prepare")
    work = sum(phases.values())
    print(
        f"{len(records)} runs, {wall:.0f} s; work {work:.0f} s: {', '.join(f'{k} {v:.0f}' for k, v in phases.items())}"
    )
    print(f"the host: {wall - work:.1f} s, {100 * (wall - work) / work:.1f} % of the work; of these")
    print(f"  {prepare:.1f} s reading data and dense weights in the workers")
    print(f"  {total - prepare - work:.1f} s within runs: checkpoints, records")
    print(f"  {wall - total:.1f} s starting, planning, hashing, tracking, reporting")


if __name__ == "__main__":
    main()
