"""What per-example gradients cost: `gradient_rows` in units of one plain forward and backward pass.

    OMP_NUM_THREADS=1 python benchmarks/rows.py

ResNet-20 in evaluation mode, a batch of 128 random 32 × 32 images; all repetitions interleaved, so that other
work on the machine falls on both sides of a ratio alike. The aim is a ratio of at most 2, but for `exact`, which
takes a backward pass for each of the ten classes.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import get_args

import torch
import torch.nn.functional as F

from sparsekit.curvature import gradient_rows
from sparsekit.curvature.rows import FisherKind
from sparsekit.likelihoods import Categorical
from sparsekit.models.resnet import resnet
from sparsekit.objective import Objective
from sparsekit.parameters import ParameterSpace


def seconds(run: Callable[..., object], *args: object) -> float:
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    repetitions = parser.parse_args().repetitions

    torch.manual_seed(0)
    model = resnet(20).eval()
    inputs, targets = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    objective = Objective(model, Categorical(), [(inputs, targets)], ParameterSpace.of(model))
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(0)

    def plain() -> None:
        torch.autograd.grad(F.cross_entropy(model(inputs), targets), parameters)

    def rows(fisher: FisherKind) -> None:
        for _ in gradient_rows(objective, fisher, generator=generator):
            pass

    print(f"{platform.machine()}, torch {torch.__version__}, threads: {torch.get_num_threads()}")
    kinds: tuple[FisherKind, ...] = get_args(FisherKind)
    ratios: dict[FisherKind, list[float]] = {kind: [] for kind in kinds}
    for repetition in range(-1, repetitions):  # the first warms up
        unit = seconds(plain)
        for kind in kinds:
            ratio = seconds(rows, kind) / unit
            if repetition >= 0:
                ratios[kind].append(ratio)
    for kind, found in ratios.items():
        low, _, high = statistics.quantiles(found, n=4)
        print(f"{kind:<10}  {statistics.median(found):.2f}  (quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
