"""Prune a network of your own, see what was done, save it and load it again.

python examples/own_model.py
"""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import sparsekit
from sparsekit.runs.masks import write_mask

# --8<-- [start:data]
# Your network and your data: any module, any iterable of (inputs, targets)
torch.manual_seed(0)
images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
images = (images / 16).float()
train, test = (images[:1500], labels[:1500]), (images[1500:], labels[1500:])


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model(test[0]).argmax(1) == test[1]).float().mean())


model = network()
optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
for _ in range(40):
    for x, y in zip(train[0].split(50), train[1].split(50), strict=True):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
print(f"dense: {accuracy(model):.1%}")
# --8<-- [end:data]

# --8<-- [start:prune]
# Prune
data = list(zip(train[0].split(50), train[1].split(50), strict=True))
pruned = sparsekit.prune(
    model, data, loss=nn.CrossEntropyLoss(), estimator="fishleg", sparsity=0.9, reconstruct="fisher"
)
print(f"pruned to {pruned.sparsity:.1%}: {accuracy(pruned.model):.1%}")
# --8<-- [end:prune]

# --8<-- [start:look]
# What was done
step = pruned.steps[-1]
print(f"predicted increase of the loss {step.predicted_increase:.4f}, measured {step.measured_increase:.4f}")
for name, kept in pruned.mask.items():
    print(f"{name}: {float(kept.float().mean()):.1%} of {kept.numel():,} weights kept")
# --8<-- [end:look]

# --8<-- [start:train]
# Train on, in a loop of your own: removed weights stay zero
optimiser = torch.optim.AdamW(pruned.model.parameters(), lr=1e-4)
with sparsekit.keep(pruned.model, pruned.mask):
    for x, y in data:
        optimiser.zero_grad()
        nn.functional.cross_entropy(pruned.model.train()(x), y).backward()
        optimiser.step()
print(f"trained on: {accuracy(pruned.model.eval()):.1%}, {sparsekit.check(pruned.model, pruned.mask):.1%} still zero")
# --8<-- [end:train]

# --8<-- [start:save]
# Save and load: a plain state_dict, with the mask beside it
with tempfile.TemporaryDirectory() as folder:
    torch.save(pruned.model.state_dict(), Path(folder) / "pruned.pt")
    write_mask(Path(folder) / "mask.safetensors", pruned.mask)
    again = network()
    again.load_state_dict(torch.load(Path(folder) / "pruned.pt"))
print(f"loaded again: {accuracy(again):.1%}")
# --8<-- [end:save]
