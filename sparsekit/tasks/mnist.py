"""`mnist`: LeNet on handwritten digits, trained here on first use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Unpack

import torch
from pydantic import Field
from torch import nn

from sparsekit.methods.interfaces import FinetuneSettings, Split, Task, TaskSettings
from sparsekit.models import lenet
from sparsekit.models.lenet import Architecture
from sparsekit.problem.likelihoods import Categorical
from sparsekit.tasks.dense import Recipe, StepwiseRecipe, cached_network, check_checkpoint, dense_network, train
from sparsekit.tasks.idx import File, MnistFiles
from sparsekit.tasks.images import Batching, ImageBatches, part, without_augmentation

#: 99.3 % right on the reporting half (lenet-300-100: 98.3 %), after two minutes on one core.
RECIPE = Recipe(epochs=10, learning_rate=1e-3, batch_size=128)
#: Of the perceptron, as published but for the number of epochs, which was 800: 20 take a minute on one core.
STUDY_RECIPE = StepwiseRecipe(epochs=20, learning_rate=0.01, batch_size=128, weight_decay=5e-4)
#: Raised with a change of architecture: cached networks are then trained anew.
RECIPE_VERSION = 1


class MnistSettings(TaskSettings):
    """Settings of `mnist`."""

    architecture: Architecture = Field(
        "lenet5", description="two convolutions, or none; mlp-300-100-tanh: that of Laurent et al., 2020"
    )
    epochs: int | None = Field(None, ge=1, description="of the dense network's training; null: the recipe's 10 or 20")
    download: bool = Field(False, description="let torchvision download the data into data_dir")


class Mnist(Task[MnistSettings]):
    """MNIST (LeCun et al., 1998): 60,000 training images, without augmentation; the 10,000 test images split into
    tuning (even indices) and reporting (odd).
    """  # noqa: D205

    name: ClassVar[str] = "mnist"
    Settings: ClassVar[type[TaskSettings]] = MnistSettings
    likelihood = Categorical()
    finetune: ClassVar[FinetuneSettings] = FinetuneSettings(epochs=0)
    sparsity: ClassVar[tuple[float, ...]] = (0.9, 0.95)

    def __init__(self, settings: MnistSettings) -> None:
        super().__init__(settings)
        check_checkpoint(settings.checkpoint)
        self._files = MnistFiles(self.name, settings.data_dir, download=settings.download)

    def network(self) -> nn.Module:
        """The architecture, untrained, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return lenet(self.settings.architecture)

    def model(self) -> nn.Module:
        """The network with the weights of `checkpoint`, else from the cache, else trained (a few minutes)."""
        return dense_network(
            self, self._cached_network, lambda model: train(model, self, self._recipe(), self._cached_network())
        )

    def _recipe(self) -> Recipe:
        recipe = STUDY_RECIPE if self.settings.architecture == "mlp-300-100-tanh" else RECIPE
        return recipe if self.settings.epochs is None else replace(recipe, epochs=self.settings.epochs)

    def _cached_network(self) -> Path:
        name = f"{self.name}-{self.settings.architecture}-v{RECIPE_VERSION}"
        return cached_network(self, name, self._recipe(), self._files.digest("train", labels=True))

    def size(self, split: Split) -> int:
        return len(self._files.labels(_file(split))[part(split)])  # which are looked at as they are read

    def batches(self, split: Split, **how: Unpack[Batching]) -> ImageBatches:
        """Images (b, 1, 28, 28) and labels (b,); there is no augmentation."""
        return ImageBatches(
            self._files.images(_file(split))[part(split)],
            self._files.labels(_file(split))[part(split)],
            mean=(0.1307,),
            std=(0.3081,),
            **without_augmentation(how),
        )

    def fingerprint(self) -> str:
        """A hash of all pixels and labels in their order, whatever the files' format."""
        return self._files.digest("train", "t10k", labels=True)


def _file(split: Split) -> File:
    return "train" if split == "train" else "t10k"
