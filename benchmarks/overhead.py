"""What a comparison costs beside its work: planning, hashing, checkpoints, records, tracking, the report.

    python benchmarks/overhead.py --data-dir CIFAR10 --checkpoint resnet20.th --output results
    python benchmarks/overhead.py --of results/cifar10-resnet20-oneshot --seconds 7200 --workers 2

One worker, one thread, tracked in a SQLite file; or, with `--of`, a comparison that took so many seconds of wall-clock
time on so many workers. Work is what the records count by phase, trials of dampings among them: curvature, removal,
reconstruction and measuring; everything else of the workers' time, waiting for one another too, is the host's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import yaml

from sparsekit.compare.plan import TRIALS, Comparison
from sparsekit.runs.directory import RunDirectory

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
        "mfac": {"estimator": "mfac"},
        "woodfisher": {"estimator": "woodfisher"},
        "magnitude": {"estimator": "identity", "saliency": "magnitude", "compensation": "none"},
    },
    "axes": {"reconstruction": ["none", "layerwise"]},
    "seeds": [0],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--checkpoint")
    parser.add_argument("--output", default="results", type=Path)
    parser.add_argument("--of", type=Path, help="a comparison that is finished")
    parser.add_argument("--seconds", type=float, help="that its command took")
    parser.add_argument("--workers", type=int, default=1, help="that it had")
    options = parser.parse_args()
    if options.of:
        if options.seconds is None:
            parser.error("--of needs --seconds, the wall-clock time of its command")
        tell(options.of, options.seconds, options.workers)
        return
    if not (options.data_dir and options.checkpoint):
        parser.error("--data-dir and --checkpoint are needed, or --of")
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "overhead.yaml"
    file.write_text(yaml.safe_dump(FILE))
    command = [sys.executable, "-m", "sparsekit", "compare", str(file), "--output", str(options.output)]
    command += ["--data-dir", options.data_dir, "--checkpoint", options.checkpoint, "--workers", "1"]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr)
    tell(options.output / "overhead", time.perf_counter() - started, 1)


def tell(directory: Path, seconds: float, workers: int) -> None:
    """Share a comparison's time between the work and the host."""
    comparison = Comparison.load(directory)
    trials = [RunDirectory(path).read() for path in (directory / TRIALS).glob("*/")]
    records = [*comparison.records.values(), *(record for record in trials if record)]
    wall = seconds * workers
    waited = waiting([(r.started, r.finished, r.seconds["prepare"]) for r in records if r.finished], workers)
    phases: dict[str, float] = {}
    for record in records:
        for phase, spent in record.seconds.items():
            phases[phase] = phases.get(phase, 0.0) + spent
    total, prepare = phases.pop("total"), phases.pop("prepare")
    work = sum(phases.values())
    print(
        f"{len(records)} runs and trials, {wall:.0f} s of {workers} worker(s); work {work:.0f} s: "
        f"{', '.join(f'{phase} {spent:.0f}' for phase, spent in phases.items())}"
    )
    print(f"the host: {wall - work:.1f} s, {100 * (wall - work) / work:.1f} % of the work; of these")
    print(f"  {prepare:.1f} s reading data and dense weights in the workers")
    print(f"  {total - prepare - work:.1f} s within runs: checkpoints, records")
    print(f"  {waited:.1f} s workers with nothing left to do, while others were at work")
    print(f"  {wall - total - waited:.1f} s starting, planning, hashing, tracking, reporting, between runs")


def waiting(spans: list[tuple[str, str, float]], workers: int) -> float:
    """Seconds of workers without a run while another one had one; (started, finished, preparation before) of each run.

    Roughly, where the comparison was interrupted: a run's span then has the pause in it.
    """
    events = []
    for started, finished, before in spans:
        events += [(datetime.fromisoformat(started) - timedelta(seconds=before), 1)]
        events += [(datetime.fromisoformat(finished), -1)]
    found, active = 0.0, 0
    for (moment, change), (after, _) in pairwise(sorted(events)):
        active += change
        found += max(0, workers - active) * (after - moment).total_seconds() * (active > 0)
    return found


if __name__ == "__main__":
    main()
