"""The task `moons`."""

from collections.abc import Iterable

import torch
from pydantic import Field
from sklearn.datasets import make_moons
from torch import Tensor, nn

from sparsekit import Categorical, Task, TaskSettings

SIZES = {"train": 1024, "tuning": 256, "reporting": 256}


class MoonsSettings(TaskSettings):
    """Settings of `moons`."""

    noise: float = Field(0.15, ge=0, description="standard deviation of the points around the half circles")


class Moons(Task[MoonsSettings]):
    """Points on two half circles; the network is trained on first use, in a second."""

    name = "moons"
    Settings = MoonsSettings
    likelihood = Categorical()

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            model = self.network()
        optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
        inputs, targets = self._points("train")
        for _ in range(150):
            optimiser.zero_grad()
            self.likelihood.losses(model(inputs), targets).mean().backward()
            optimiser.step()
        return model.eval()

    def size(self, split) -> int:
        return SIZES[split]

    def batches(
        self, split, *, batch_size, limit=None, generator=None, augment=False
    ) -> Iterable[tuple[Tensor, Tensor]]:
        inputs, targets = self._points(split)
        order = torch.arange(len(inputs)) if generator is None else torch.randperm(len(inputs), generator=generator)
        order = order[:limit]
        return list(zip(inputs[order].split(batch_size), targets[order].split(batch_size), strict=True))

    def fingerprint(self) -> str:
        return f"two moons, noise {self.settings.noise:g}, version 1"  # of files: a hash of their contents

    def _points(self, split) -> tuple[Tensor, Tensor]:
        points, labels = make_moons(SIZES[split], noise=self.settings.noise, random_state=list(SIZES).index(split))
        return torch.from_numpy(points).float(), torch.from_numpy(labels)


Moons.conformance = {
    "make": lambda: Moons(MoonsSettings()),
    "other": lambda: Moons(MoonsSettings(noise=0.3)),
}
