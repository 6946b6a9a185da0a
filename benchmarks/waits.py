"""How often an accelerator's host has to wait, by phase: a batch more, and what does not grow with the batches.

    python benchmarks/waits.py            # on the pretended device of tests/device, which needs g++
    python benchmarks/waits.py --places   # with the lines of code that wait

Counted are reads of single numbers, selections whose size depends on values, copies to the host and what else CUDA
waits for; not copies to the device. ResNet-8 with random weights: counts depend on neither.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "device"))
import pretend

from sparsekit import Categorical, Mask, Objective, ParameterSpace
from sparsekit.methods.interfaces import FinetuneSettings, ReconstructionSettings
from sparsekit.models.resnet import resnet
from sparsekit.problem.measurement import measure
from sparsekit.pruning.batch_norm import recalibrate
from sparsekit.pruning.finetune import finetune
from sparsekit.reconstruction.fit import Reconstruction, output_moments
from sparsekit.registry.installed import load_registry

BATCH = 16
REGISTRY = load_registry()
Waits = Counter[tuple[str, str, str]]


def problem(batches: int, device: torch.device) -> Objective:
    torch.manual_seed(0)
    model = resnet(8).eval().to(device)
    inputs, targets = torch.randn(batches * BATCH, 3, 32, 32), torch.randint(10, (batches * BATCH,))
    pairs = zip(inputs.split(BATCH), targets.split(BATCH), strict=True)
    return Objective(model, Categorical(), [(x.to(device), y.to(device)) for x, y in pairs], ParameterSpace.of(model))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pruned(objective: Objective) -> Mask:
    kept = (torch.rand(objective.space.size, generator=seeded()) > 0.8).to(objective.device)
    objective.space.write(objective.model, objective.space.read(objective.model) * kept)
    return Mask(kept)


def estimate(name: str) -> Callable[[Objective], Callable[[], object]]:
    def prepared(objective: Objective) -> Callable[[], object]:
        kind = REGISTRY.get("estimator", name)
        made = kind(objective.space, kind.Settings(examples=len(objective.batches) * BATCH))
        return lambda: made.update(objective, generator=seeded())

    return prepared


def fit(objective: Objective) -> Callable[[], object]:
    dense, mask = deepcopy(objective.model), pruned(objective)
    weighting = output_moments(objective, "importance", seeded())
    work = Reconstruction(
        objective.model, dense, objective.space, mask, objective.batches,
        ReconstructionSettings(how="fisher", held_out=0), weighting=weighting, statistics_anew=True,
    )  # fmt: skip
    return lambda: list(work.run())


def train(objective: Objective) -> Callable[[], object]:
    mask, settings = pruned(objective), FinetuneSettings(epochs=1)
    return lambda: finetune(
        objective.model, objective.likelihood, lambda: objective.batches, objective.space, mask, settings,
        batches_per_epoch=len(objective.batches),
    )  # fmt: skip


PHASES: dict[str, Callable[[Objective], Callable[[], object]]] = {
    **{f"estimate, {name}": estimate(name) for name in REGISTRY.names("estimator") if name != "identity"},
    "loss": lambda objective: objective.loss,
    "measure": lambda objective: lambda: measure(objective.model, objective.likelihood, objective.batches),
    "batch norm statistics": lambda objective: lambda: recalibrate(objective.model, objective.batches),
    "fit of eight layers": fit,
    "training": train,
}


def waits(phase: str, batches: int, device: torch.device) -> Waits:
    """The waits of one phase over so many batches, by what and where."""
    work = PHASES[phase](problem(batches, device))
    with pretend.Watch() as watch:
        work()
    return watch.waits()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", action="store_true")
    places = parser.parse_args().places
    device = pretend.register()
    print("| phase | a batch | besides |\n|---|---|---|")
    for phase in PHASES:
        few, many = (waits(phase, batches, device) for batches in (4, 12))
        each = (many.total() - few.total()) / 8
        print(f"| {phase} | {each:g} | {few.total() - 4 * each:g} |", flush=True)
        if places:
            for place, count in many.most_common(12):
                print("   ", count, *place)


if __name__ == "__main__":
    main()
