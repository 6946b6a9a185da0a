"""Three estimates of curvature on one network: what each predicts of a cut, and what the cut costs in truth.

python examples/estimators_side_by_side.py
"""

from copy import deepcopy

import torch
from sklearn.datasets import load_digits
from torch import nn

import sparsekit

torch.manual_seed(0)
images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
data = list(zip((images / 16).float().split(64), labels.split(64), strict=True))
model = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
for _ in range(30):
    for x, y in data:
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()

print(f"{'estimator':12}{'predicted ΔL':>14}{'measured ΔL':>14}")
for estimator in ("diagonal", "obs", "fishleg"):
    pruned = sparsekit.prune(
        deepcopy(model),
        data,
        loss=nn.CrossEntropyLoss(),
        estimator=estimator,
        sparsity=0.7,
        saliency="obs",  # the same rule for all three: w² / 2Σ_ii
        reconstruct="none",  # the cut and its compensation alone
    )
    step = pruned.steps[-1]
    print(f"{estimator:12}{step.predicted_increase:14.4f}{step.measured_increase:14.4f}")
