"""What an estimate of curvature costs, in plain forward and backward passes over the same examples.

    python benchmarks/curvature.py                    # one thread; a few minutes
    python benchmarks/curvature.py --networks autoencoder --examples 1024
    python benchmarks/curvature.py --diagonals        # the diagonal of F alone, by how its columns are drawn

A plain pass is the loss and its gradient by all weights, batch by batch. All repetitions are interleaved in one
process, so that other work on the machine falls on both sides of a ratio alike; the processor's time counts. Random
weights, inputs and labels: what is measured does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

from sparsekit import CurvatureEstimator, Objective, ParameterSpace
from sparsekit.curvature import fisher_diagonal
from sparsekit.machine import describe_machine
from sparsekit.methods.estimators import DiagonalFisher
from sparsekit.models.autoencoder import Autoencoder
from sparsekit.models.lenet import lenet
from sparsekit.models.resnet import resnet
from sparsekit.models.vgg11 import vgg11
from sparsekit.problem.likelihoods import Bernoulli, Categorical, Likelihood
from sparsekit_fishleg import FishLeg
from sparsekit_obs.layerwise import LayerwiseSurgeon

Problem = tuple[nn.Module, Likelihood, Tensor, Tensor]


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def network(name: str, examples: int) -> Problem:
    """The model, its loss, inputs and targets."""
    torch.manual_seed(0)
    labels = torch.randint(10, (examples,))
    if name == "autoencoder":
        inputs = torch.rand(examples, 784)
        return Autoencoder(), Bernoulli(), inputs, inputs
    if name == "resnet20":
        return resnet(20).eval(), Categorical(), torch.randn(examples, 3, 32, 32), labels
    if name == "vgg11":
        return vgg11(10).eval(), Categorical(), torch.randn(examples, 3, 32, 32), labels
    if name == "mlp-300-100-tanh":
        return lenet("mlp-300-100-tanh"), Categorical(), torch.randn(examples, 1, 28, 28), labels
    return mlp({"mlp-1m": 690, "mlp-5m": 1870}[name]), Categorical(), torch.randn(examples, 784), labels


class Diagonalisations:
    """Seconds spent in eigendecompositions, which do not grow with the examples."""

    def __init__(self) -> None:
        self.seconds, self._eigh = 0.0, torch.linalg.eigh

    def __call__(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        started = time.process_time()
        found = self._eigh(matrix)
        self.seconds += time.process_time() - started
        return found[0], found[1]


def plain(objective: Objective) -> Callable[[], float]:
    parameters = list(objective.model.parameters())

    def run() -> float:
        for inputs, targets in objective.batches:
            loss = objective.likelihood.losses(objective.model(inputs), targets).mean()
            torch.autograd.grad(loss, parameters)
        return 0.0

    return run


def estimate(kind: type[CurvatureEstimator], objective: Objective, **settings: object) -> Callable[[], float]:
    """One first update; gives the seconds of its eigendecompositions."""

    def run() -> float:
        made = kind(objective.space, kind.Settings(**settings))
        spent = Diagonalisations()
        with mock.patch("torch.linalg.eigh", spent):
            made.update(objective, generator=torch.Generator().manual_seed(0))
        return spent.seconds

    return run


def measure(name: str, examples: int, batch: int, repetitions: int) -> None:
    """Print the rows of one network."""
    model, likelihood, inputs, targets = network(name, examples)
    batches = list(zip(inputs.split(batch), targets.split(batch), strict=True))
    matrices = [n for n, p in model.named_parameters() if p.dim() > 1]
    objective = Objective(model, likelihood, batches, ParameterSpace.of(model, include=matrices))
    unit = plain(objective)
    work = {
        "diagonal": estimate(DiagonalFisher, objective),
        "fishleg": estimate(FishLeg, objective),
        "obs-layerwise": estimate(LayerwiseSurgeon, objective, allocation="fisher"),
    }
    whole: dict[str, list[float]] = {what: [] for what in work}
    without: dict[str, list[float]] = {what: [] for what in work}
    for repetition in range(-1, repetitions):  # the first warms up
        started = time.process_time()
        unit()
        one = time.process_time() - started
        for what, run in work.items():
            started = time.process_time()
            diagonalising = run()
            spent = time.process_time() - started
            if repetition >= 0:
                whole[what].append(spent / one)
                without[what].append((spent - diagonalising) / one)
    for what in work:
        figures = [f"{statistics.median(x):.1f} ({min(x):.1f}–{max(x):.1f})" for x in (whole[what], without[what])]
        print(f"| {name}, {objective.space.size:,} | {examples} | {what} | {figures[0]} | {figures[1]} |", flush=True)


def diagonals(name: str, examples: int, batch: int, repetitions: int) -> None:
    """Print the row of one network: the diagonal of the Gauss-Newton matrix, exact and drawn."""
    model, likelihood, inputs, targets = network(name, examples)
    batches = list(zip(inputs.split(batch), targets.split(batch), strict=True))
    objective = Objective(model, likelihood, batches, ParameterSpace.of(model))
    unit, kinds = plain(objective), ("exact", "sampled", "importance")
    ratios: dict[str, list[float]] = {kind: [] for kind in (*kinds, "exact / sampled")}
    for repetition in range(-1, repetitions):
        started = time.process_time()
        unit()
        one = time.process_time() - started
        spent = {}
        for kind in kinds:
            started = time.process_time()
            fisher_diagonal(objective, kind, generator=torch.Generator().manual_seed(0))
            spent[kind] = time.process_time() - started
        if repetition >= 0:
            for kind in kinds:
                ratios[kind].append(spent[kind] / one)
            ratios["exact / sampled"].append(spent["exact"] / spent["sampled"])
    figures = [f"{statistics.median(x):.1f} ({min(x):.1f}–{max(x):.1f})" for x in ratios.values()]
    print(f"| {name}, {objective.space.size:,} | {examples} | {' | '.join(figures)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["autoencoder", "mlp-1m", "mlp-5m", "resnet20", "mlp-300-100-tanh", "vgg11"]
    parser.add_argument("--networks", nargs="*", choices=names, default=names[:4])
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--diagonals", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in describe_machine(torch.device("cpu")).items()) + "\n")
    if given.diagonals:
        print("| network, weights | examples | exact | sampled | importance | exact / sampled |")
        print("|---|---|---|---|---|---|")
        for name in given.networks:
            diagonals(name, given.examples, given.batch, given.repetitions)
        return
    print("| network, weights | examples | estimator | plain passes | without eigendecompositions |")
    print("|---|---|---|---|---|")
    for name in given.networks:
        measure(name, given.examples, given.batch, given.repetitions)


if __name__ == "__main__":
    main()
