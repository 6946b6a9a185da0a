"""FishLeg against the exact inverse: every structure and start, before and after auxiliary steps.

    OMP_NUM_THREADS=1 python benchmarks/fishleg.py

Two small networks in float64 on scikit-learn's digits. For each, the exact Fisher of all training examples cut to one
block a tensor, damped and inverted, is compared with Q: ‖Q − H⁻¹‖ / ‖H⁻¹‖ in the Frobenius norm; the correlation of
log diag Q with log diag H⁻¹ over all weights; and the auxiliary loss above its minimum, (A(Q) − A(H⁻¹)) / |A(H⁻¹)|
with A(Q) = ½ tr QHQ − tr Q, what the fit itself minimises. "limit": the best Q of the structure, found by descending on
A with the dense H in 1,000 steps from the eigenbasis.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from sparsekit import Categorical, Objective, ParameterSpace
from sparsekit.curvature import gradient_rows
from sparsekit_fishleg.estimator import FishLeg
from sparsekit_fishleg.settings import FishLegSettings

STRUCTURES = ("eigenbasis", "kronecker", "outer", "three-factor", "frozen", "blocks", "diagonal", "dense")
RELATIVE_DAMPING = 0.1


def data() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images[:1280]) / 16, torch.from_numpy(labels[:1280])


def trained(name: str, seed: int) -> nn.Module:
    """A network of up to 4,000 weights, trained to fit the digits."""
    inputs, labels = data()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "mlp":
            layers: list[nn.Module] = [nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10)]
        else:
            layers = [
                nn.Unflatten(1, (1, 8, 8)),
                nn.Conv2d(1, 8, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(8, 12, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=2),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(48, 10),
            ]
        model = nn.Sequential(*layers).double()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=1e-4)
    for _ in range(200):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def compare(Q: list[Tensor], H: list[Tensor], inverse: list[Tensor]) -> tuple[float, float, float]:
    """Relative error, correlation of log diagonals, relative excess of the auxiliary loss."""
    error = sum(float((q - t).square().sum()) for q, t in zip(Q, inverse, strict=True))
    whole = sum(float(t.square().sum()) for t in inverse)
    diagonals = torch.stack([torch.cat([m.diagonal() for m in ms]).log() for ms in (Q, inverse)])
    least = -0.5 * sum(float(t.trace()) for t in inverse)
    reached = sum(float(0.5 * (q * (h @ q)).sum() - q.trace()) for q, h in zip(Q, H, strict=True))
    return (error / whole) ** 0.5, float(torch.corrcoef(diagonals)[0, 1]), (reached - least) / abs(least)


def blocks_of(made: FishLeg) -> list[Tensor]:
    return [part.dense() for part in made.inverse().operator.parts]  # type: ignore[attr-defined]


def limit(made: FishLeg, H: list[Tensor], steps: int) -> list[Tensor]:
    """The blocks' Q where A, taken with the dense H, is as low as a long descent brings it."""
    out = []
    for block, h in zip(made._blocks, H, strict=True):
        parameters, eye = block.trainable(), torch.eye(len(h), dtype=h.dtype)
        optimiser = torch.optim.Adam(parameters.values(), 1e-2)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        unit = float(h.diagonal().mean())
        for _ in range(steps):
            Q = block.product(block.parts(parameters), eye)
            loss = unit * (0.5 * (Q * (h @ Q)).sum() - Q.trace())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            decay.step()
        out.append(block.product(block.parts(parameters), eye).detach())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="auxiliary steps")
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--limit", type=int, default=0, help="steps on the dense A for the best Q of a structure")
    parser.add_argument("--only", nargs="*", default=STRUCTURES)
    options = parser.parse_args()
    inputs, labels = data()
    batches = list(zip(inputs.split(64), labels.split(64), strict=True))
    for network in ("mlp", "convolutions"):
        found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for seed in range(options.seeds):
            model = trained(network, seed)
            objective = Objective(model, Categorical(), batches, ParameterSpace.of(model))
            sizes = [info.size for info in objective.space.parameters]
            fisher = [torch.zeros(n, n, dtype=torch.float64) for n in sizes]
            for rows in gradient_rows(objective, "exact"):
                for total, part in zip(fisher, rows.split(sizes, dim=1), strict=True):
                    total.addmm_(part.mT, part, alpha=1 / len(inputs))
            gamma = RELATIVE_DAMPING * float(torch.cat([f.diagonal() for f in fisher]).mean())
            H = [f + gamma * torch.eye(len(f), dtype=f.dtype) for f in fisher]
            inverse = [torch.linalg.inv(h) for h in H]
            base: dict[str, Any] = {"fisher": "exact", "damping": gamma, "damping_scale": "absolute"}
            for structure in options.only:
                for start in ("eigenbasis", "identity"):
                    for steps in (0, options.steps):
                        settings = base | {"structure": structure, "start": start, "auxiliary_steps": steps}
                        if options.learning_rate:
                            settings |= {"auxiliary_learning_rate": options.learning_rate}
                        made = FishLeg(objective.space, FishLegSettings.model_construct(**settings))  # I/γ itself too
                        figures = made.update(objective, generator=torch.Generator().manual_seed(seed))
                        key = (structure, f"{start}, {steps} steps")
                        found.setdefault(key, []).append(compare(blocks_of(made), H, inverse))
                        if steps:
                            print(f"# {network} {seed} {key}: {figures}", flush=True)
                        if options.limit and not steps and start == "eigenbasis":
                            best = compare(limit(made, H, options.limit), H, inverse)
                            found.setdefault((structure, "limit"), []).append(best)
        print(f"\n{network}, {sum(sizes):,} weights, {options.seeds} seeds, mean (range)\n")
        print("| structure | start | relative error | correlation of log diag | A above its minimum |")
        print("|---|---|---|---|---|")
        for (structure, start), values in found.items():
            cells = [f"{sum(v) / len(v):.3f} ({min(v):.3f}–{max(v):.3f})" for v in zip(*values, strict=True)]
            print(f"| {structure} | {start} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
