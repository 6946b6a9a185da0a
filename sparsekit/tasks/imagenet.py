"""`imagenet`: torchvision's networks on the user's own folder of ImageNet."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, Unpack

import torch
from pydantic import Field
from torch import nn

from sparsekit.errors import DataError
from sparsekit.machine import cores
from sparsekit.methods.interfaces import FinetuneSettings, Split, Task, TaskSettings
from sparsekit.models import load_checkpoint
from sparsekit.problem.likelihoods import Categorical
from sparsekit.tasks.dense import check_checkpoint
from sparsekit.tasks.folders import FolderBatches, Sample, file_digest
from sparsekit.tasks.images import Batching, part

Folder = Literal["train", "val"]

#: What torchvision's weights tell apart.
PUBLISHED_CLASSES = 1000


class ImageNetSettings(TaskSettings):
    """Settings of `imagenet`."""

    architecture: str = Field("resnet50", description="a classification network of torchvision.models")
    download: bool = Field(False, description="take the weights from torchvision, which downloads them")
    weights: str = Field("IMAGENET1K_V1", description="which of torchvision's weights, with download=true")
    workers: int | None = Field(
        None,
        ge=0,
        description="processes that decode images; 0: the run's own, as by default on the CPU; on an accelerator all "
        "cores but one by default, 16 at most",
    )


class ImageNet(Task[ImageNetSettings]):
    """ImageNet (Russakovsky et al., 2015), 224 × 224 pixels, from train/<class>/* and val/<class>/* in `data_dir`;
    the validation images, sorted by class and name, split into tuning (even indices) and reporting (odd).

    The network has as many classes as the folder. Weights are a `checkpoint`'s, or torchvision's with `download`.
    """  # noqa: D205

    name: ClassVar[str] = "imagenet"
    Settings: ClassVar[type[TaskSettings]] = ImageNetSettings
    likelihood = Categorical()
    finetune: ClassVar[FinetuneSettings] = FinetuneSettings(
        epochs=0, learning_rate=0.005, weight_decay=1e-4, batch_size=256
    )
    sparsity: ClassVar[tuple[float, ...]] = (0.5, 0.8)

    def __init__(self, settings: ImageNetSettings) -> None:
        super().__init__(settings)
        _refuse_unknown(settings.architecture)
        if settings.checkpoint is None and not settings.download:
            raise DataError(
                f"the task 'imagenet' prunes a trained {settings.architecture}; give its weights by --checkpoint, or "
                "set task.download=true where there is a network"
            )
        check_checkpoint(settings.checkpoint, trains=False)
        if settings.data_dir is None:
            raise DataError("the task 'imagenet' needs --data-dir: a folder with train/<class>/* and val/<class>/*")
        self._root = Path(settings.data_dir)
        if not self._root.is_dir():
            raise DataError(f"there is no data directory '{self._root}'")
        missing = [folder for folder in ("train", "val") if not (self._root / folder).is_dir()]
        if missing:
            raise DataError(
                f"'{self._root}' holds no folder {' and no '.join(missing)}; train/<class>/* and val/<class>/* were "
                "needed: give another --data-dir"
            )
        self._listed: dict[Folder, Sequence[Sample]] = {}

    @cached_property
    def _classes(self) -> list[str]:
        train, val = (
            sorted(path.name for path in (self._root / f).iterdir() if path.is_dir()) for f in ("train", "val")
        )
        if not train or train != val:
            raise DataError(
                f"'{self._root}' has {len(train)} classes in train and {len(val)} in val, or not the same ones; a "
                "folder for each class was needed in both: sort the images into them"
            )
        return train

    def network(self) -> nn.Module:
        """The architecture with as many classes as the folder, untrained, the same for the same seed."""
        from torchvision.models import get_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            network: nn.Module = get_model(self.settings.architecture, weights=None, num_classes=len(self._classes))
            return network

    def model(self) -> nn.Module:
        """The network with the checkpoint's weights, or torchvision's."""
        model = self.network()
        if self.settings.checkpoint is not None:
            load_checkpoint(model, Path(self.settings.checkpoint))
        else:
            model.load_state_dict(self._published())
        return model.eval()

    def _published(self) -> dict[str, object]:
        from torchvision.models import get_model_weights

        if len(self._classes) != PUBLISHED_CLASSES:
            raise DataError(
                f"'{self._root}' has {len(self._classes)} classes, torchvision's weights {PUBLISHED_CLASSES}; give "
                "weights that fit by --checkpoint"
            )
        known = get_model_weights(self.settings.architecture)
        if self.settings.weights not in known.__members__:
            raise DataError(
                f"torchvision has no weights '{self.settings.weights}' of {self.settings.architecture}; set "
                f"task.weights to one of {', '.join(known.__members__)}"
            )
        try:
            state: dict[str, object] = known[self.settings.weights].get_state_dict(progress=False, check_hash=True)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"torchvision cannot download the weights of {self.settings.architecture} ({error}); give them by "
                "--checkpoint"
            ) from error
        return state

    def size(self, split: Split) -> int:
        """The number of examples; files are listed, not read."""
        return len(self._samples(split))

    def batches(self, split: Split, **how: Unpack[Batching]) -> FolderBatches:
        return FolderBatches(self._samples(split), workers=self._workers(), **how)

    def _workers(self) -> int:
        given = self.settings.workers
        if given is not None:
            return given
        return 0 if self.device.type == "cpu" else min(16, cores() - 1)

    def fingerprint(self) -> str:
        """A hash of the image files' names, classes and sizes, not of their 150 GB of contents."""
        digests = [file_digest(self._root, (path for path, _ in self._files(f))) for f in ("train", "val")]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def _samples(self, split: Split) -> Sequence[Sample]:
        return self._files("train" if split == "train" else "val")[part(split)]

    def _files(self, folder: Folder) -> Sequence[Sample]:
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        if folder not in self._listed:
            numbers = {name: label for label, name in enumerate(self._classes)}
            try:
                self._listed[folder] = make_dataset(str(self._root / folder), numbers, IMG_EXTENSIONS)
            except OSError as error:  # a class without images among them
                raise DataError(
                    f"'{self._root / folder}' cannot be listed ({error}); images in a folder for each class were needed"
                ) from error
        return self._listed[folder]


def _refuse_unknown(architecture: str) -> None:
    from torchvision import models

    known = models.list_models(module=models)
    if architecture not in known:
        near = get_close_matches(architecture, known, n=1)
        raise DataError(
            f"torchvision has no classification network '{architecture}'"
            + (f"; did you mean '{near[0]}'?" if near else "; torchvision.models.list_models() names them")
        )
