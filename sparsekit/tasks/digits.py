"""`digits`: scikit-learn's bundled 8 × 8 images and a small network, trained here on first use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn

from sparsekit.errors import DataError
from sparsekit.methods.interfaces import FinetuneSettings, Split, Task, TaskSettings
from sparsekit.models import DigitsNet
from sparsekit.problem.likelihoods import Categorical
from sparsekit.problem.objective import Batch
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.pruning.finetune import finetune
from sparsekit.tasks.dense import check_checkpoint, dense_network
from sparsekit.tasks.images import Batching, ImageBatches, cache_directory, without_augmentation

#: 1,797 images: these for training, the rest split between tuning (even) and reporting (odd).
TRAINING = 1297
#: Raised with every change of the recipe or the architecture: cached networks are then trained anew.
RECIPE_VERSION = 1
RECIPE = FinetuneSettings(epochs=40, learning_rate=0.05, momentum=0.9, weight_decay=5e-4, batch_size=64)
#: In the name of a cached network too, so that a changed recipe is never answered by an old network.
RECIPE_HASH = hashlib.sha256(RECIPE.model_dump_json().encode()).hexdigest()[:8]


class Digits(Task[TaskSettings]):
    """Handwritten digits, real but tiny: good for trying things out, too easy to rank methods by."""

    name: ClassVar[str] = "digits"
    likelihood = Categorical()
    finetune: ClassVar[FinetuneSettings] = FinetuneSettings(epochs=3, learning_rate=0.02, batch_size=64)

    def __init__(self, settings: TaskSettings) -> None:
        super().__init__(settings)
        if settings.data_dir is not None:
            raise DataError(f"the task '{self.name}' brings its own images; leave --data-dir out")
        check_checkpoint(settings.checkpoint)

    def network(self) -> nn.Module:
        """`DigitsNet`, untrained, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return DigitsNet()

    def model(self) -> nn.Module:
        """The network with the weights of `checkpoint`, else from the cache, else trained (some seconds)."""
        return dense_network(self, self._cached_network, self._train)

    def _cached_network(self) -> Path:
        return cache_directory() / f"digits-v{RECIPE_VERSION}-{RECIPE_HASH}-seed{self.settings.seed}.safetensors"

    def _train(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(self.settings.seed)
        space = ParameterSpace.of(model)
        batches = self.batches("train", batch_size=RECIPE.batch_size, generator=generator)
        finetune(
            model,
            self.likelihood,
            lambda: batches,
            space,
            Mask.full(space.size, next(model.parameters()).device),
            RECIPE,
            batches_per_epoch=-(-TRAINING // RECIPE.batch_size),
            progress=self.progress,
        )

    @cached_property
    def _arrays(self) -> tuple[Tensor, Tensor]:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
        images = (torch.from_numpy(bunch.images) * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
        return images[order], torch.from_numpy(bunch.target).long()[order]

    def _part(self, split: Split) -> tuple[Tensor, Tensor]:
        where = {
            "train": slice(0, TRAINING),
            "tuning": slice(TRAINING, None, 2),
            "reporting": slice(TRAINING + 1, None, 2),
        }[split]
        images, labels = self._arrays
        return images[where], labels[where]

    def size(self, split: Split) -> int:
        """1,297 for training, 250 each for tuning and reporting."""
        return len(self._part(split)[1])

    def batches(self, split: Split, **how: Unpack[Batching]) -> Iterable[Batch]:
        """Images (b, 1, 8, 8) and labels (b,); there is no augmentation."""
        images, labels = self._part(split)
        return ImageBatches(images, labels, mean=(0.306,), std=(0.376,), **without_augmentation(how))

    def fingerprint(self) -> str:
        """A hash of all pixels and labels in their order."""
        images, labels = self._arrays
        return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
