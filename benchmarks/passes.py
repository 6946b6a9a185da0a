"""What curvature costs in units of one plain forward and backward pass: gradient rows, and FishLeg's auxiliary steps.

    python benchmarks/speed.py passes

ResNet-20 in evaluation mode, a batch of 128 random 32 × 32 images; all repetitions interleaved, so that other work on
the machine falls on both sides of a ratio alike. The aims: rows in at most 2 passes, but for `exact`, which takes a
backward pass for each of the ten classes; an auxiliary step with 8 u in at most 3, with products within layers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
import torch.nn.functional as F

from sparsekit.curvature import gradient_rows
from sparsekit.curvature.vectors import FisherKind
from sparsekit.models.resnet import resnet
from sparsekit.problem.likelihoods import Categorical
from sparsekit.problem.objective import Objective
from sparsekit.problem.parameters import ParameterSpace
from sparsekit_fishleg.auxiliary import AuxiliaryProblem
from sparsekit_fishleg.estimator import FishLeg
from sparsekit_fishleg.products import layer_product, network_product
from sparsekit_fishleg.settings import FishLegSettings


def seconds(run: Callable[[], object]) -> float:
    """The processor's time that it took, which others on the machine do not add to."""
    start = time.process_time()
    run()
    return time.process_time() - start


def auxiliary_step(objective: Objective, products: str) -> Callable[[], object]:
    """One step of the fit with 8 u, from the eigenbasis."""
    made = FishLeg(objective.space, FishLegSettings(auxiliary_steps=0))
    generator = torch.Generator().manual_seed(0)
    gamma = made.update(objective, generator=generator)["mean_diagonal"] * made.settings.damping
    like = torch.empty(0)
    problem = AuxiliaryProblem(made._blocks, gamma, 8, True, generator, like)
    parameters = [block.trainable() for block in made._blocks]
    optimiser = torch.optim.Adam([t for layer in parameters for t in layer.values()], lr=1e-3)
    within = layer_product(objective, made.settings.fisher, generator)
    fisher = within if products == "layer" else network_product(objective)
    return lambda: problem.step(parameters, optimiser, fisher)


def measure(repetitions: int) -> None:
    """Print the table."""
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

    print("| in plain forward and backward passes, ResNet-20, batch 128 | median (quartiles) |\n|---|---|")
    kinds: tuple[FisherKind, ...] = get_args(FisherKind)
    work: dict[str, Callable[[], object]] = {f"rows, {kind}": partial(rows, kind) for kind in kinds}
    work |= {f"auxiliary step, products by {how}": auxiliary_step(objective, how) for how in ("layer", "network")}
    ratios: dict[str, list[float]] = {name: [] for name in work}
    for repetition in range(-1, repetitions):  # the first warms up
        unit = seconds(plain)
        for name, run in work.items():
            ratio = seconds(run) / unit
            if repetition >= 0:
                ratios[name].append(ratio)
    for name, found in ratios.items():
        low, _, high = statistics.quantiles(found, n=4)
        print(f"| {name} | {statistics.median(found):.2f} ({low:.2f}–{high:.2f}) |", flush=True)
