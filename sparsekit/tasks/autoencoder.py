"""`autoencoder`: a deep autoencoder of MNIST, trained here on first use."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Unpack

import torch
from pydantic import Field
from torch import Tensor, nn

from sparsekit.methods.interfaces import FinetuneSettings, Split, Task, TaskSettings
from sparsekit.models import Autoencoder
from sparsekit.problem.likelihoods import Bernoulli
from sparsekit.problem.objective import as_found
from sparsekit.tasks.dense import Recipe, cached_network, check_checkpoint, dense_network, train
from sparsekit.tasks.idx import MnistFiles
from sparsekit.tasks.images import Batching, ImageBatches, MappedBatches, part, without_augmentation

#: 58.6 nats and a squared error of 3.5 per image were found on the reporting half, after a quarter of an hour.
RECIPE = Recipe(epochs=20, learning_rate=1e-3, batch_size=128)
#: Raised with a change of architecture: cached networks are then trained anew.
RECIPE_VERSION = 1


class AutoencoderSettings(TaskSettings):
    """Settings of `autoencoder`."""

    download: bool = Field(False, description="let torchvision download the data into data_dir")


class MnistAutoencoder(Task[AutoencoderSettings]):
    """The benchmark of optimisers and of FishLeg: 784-1000-500-250-30 and back, rectified, the code linear, on MNIST.

    Grey levels in [0, 1] are inputs and targets. The loss is −log p *summed* over the 784 pixels, in nats per image,
    as the literature gives it; a grey pixel has entropy, so that it can not reach zero. 60,000 training images; the
    10,000 test images split into tuning (even indices) and reporting (odd).

    Reference: Hinton and Salakhutdinov, 2006.
    """

    name: ClassVar[str] = "autoencoder"
    Settings: ClassVar[type[TaskSettings]] = AutoencoderSettings
    likelihood = Bernoulli(reduction="sum")
    finetune: ClassVar[FinetuneSettings] = FinetuneSettings(epochs=0, learning_rate=3e-4, weight_decay=0)

    def __init__(self, settings: AutoencoderSettings) -> None:
        super().__init__(settings)
        check_checkpoint(settings.checkpoint)
        self._files = MnistFiles(self.name, settings.data_dir, download=settings.download)

    def network(self) -> nn.Module:
        """`Autoencoder`, untrained, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return Autoencoder()

    def model(self) -> nn.Module:
        """The network with the weights of `checkpoint`, else from the cache, else trained (a quarter of an hour)."""
        return dense_network(
            self, self._cached_network, lambda model: train(model, self, RECIPE, self._cached_network())
        )

    def _cached_network(self) -> Path:
        return cached_network(self, f"{self.name}-v{RECIPE_VERSION}", RECIPE, self._files.digest("train", labels=False))

    def size(self, split: Split) -> int:
        return len(self._part(split))

    def _part(self, split: Split) -> Tensor:
        return self._files.images("train" if split == "train" else "t10k")[part(split)]

    def batches(self, split: Split, **how: Unpack[Batching]) -> MappedBatches:
        """(pixels, pixels), each (b, 784) in [0, 1]; there is no augmentation."""
        images = self._part(split)
        labels = torch.zeros(len(images), dtype=torch.long)
        batches = ImageBatches(images, labels, mean=(0.0,), std=(1.0,), **without_augmentation(how))
        return MappedBatches(batches, lambda pixels, _: (pixels.flatten(1), pixels.flatten(1)))

    def fingerprint(self) -> str:
        """A hash of all pixels in their order, whatever the files' format."""
        return self._files.digest("train", "t10k", labels=False)

    def measure(self, model: nn.Module, split: Split) -> dict[str, float]:
        """The mean loss in nats per image, and the squared error summed over an image's pixels."""
        device = next(model.parameters()).device
        loss, squares = 0.0, 0.0
        with as_found(model), torch.no_grad():
            for pixels, _ in self.batches(split, batch_size=500):
                given = pixels.to(device)
                logits = model(given)
                loss += float(self.likelihood.losses(logits, given).double().sum())
                squares += float((logits.sigmoid() - given).square().double().sum())
        return {"loss": loss / self.size(split), "squared_error": squares / self.size(split)}
