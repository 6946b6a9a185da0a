"""`digits-transformer`: scikit-learn's digits as sequences of grey levels, and a small transformer trained here."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Unpack

import torch
from torch import nn

from sparsekit.methods.interfaces import FinetuneSettings, Split
from sparsekit.models import SequenceClassifier
from sparsekit.tasks.dense import Recipe, train
from sparsekit.tasks.digits import Digits
from sparsekit.tasks.images import Batching, ImageBatches, MappedBatches, cache_directory

#: Images shift by a pixel in training: without that, 1,297 of them are learnt by heart, with 95 % right.
RECIPE = Recipe(epochs=100, learning_rate=3e-3, batch_size=64, weight_decay=0.05)
#: Raised with a change of architecture: cached networks are then trained anew.
RECIPE_VERSION = 1


class DigitsTransformer(Digits):
    """The images of `digits`, row by row, as 64 tokens of 17 grey levels: attention and embeddings, small and real."""

    name: ClassVar[str] = "digits-transformer"
    finetune: ClassVar[FinetuneSettings] = FinetuneSettings(epochs=5, learning_rate=0.005, batch_size=64)

    def network(self) -> nn.Module:
        """`SequenceClassifier`, untrained, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return SequenceClassifier()

    def _cached_network(self) -> Path:
        name = f"digits-transformer-v{RECIPE_VERSION}-{RECIPE.hash}-seed{self.settings.seed}.safetensors"
        return cache_directory() / name

    def _train(self, model: nn.Module) -> None:
        train(model, self, RECIPE, self._cached_network())

    def batches(self, split: Split, **how: Unpack[Batching]) -> MappedBatches:
        """Tokens (b, 64) int64 in 0 … 16, and labels (b,); augmented, images shift by a pixel."""
        images, labels = self._part(split)
        batches = ImageBatches(images, labels, mean=(0.0,), std=(1.0,), padding=1, mirror=False, **how)
        return MappedBatches(batches, lambda pixels, labels: ((16 * pixels).round().long().flatten(1), labels))
