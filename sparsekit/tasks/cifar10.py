"""`cifar10`: the ResNet-20 family from a dense checkpoint, or ResNet-18 and VGG11 trained here, on CIFAR-10."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from sparsekit.errors import DataError
from sparsekit.methods.interfaces import FinetuneSettings, Split, Task, TaskSettings
from sparsekit.models import preact_resnet18, resnet, resnet18, vgg11
from sparsekit.problem.likelihoods import Categorical
from sparsekit.tasks.dense import (
    RESIDUAL,
    Recipe,
    StepwiseRecipe,
    cached_network,
    check_checkpoint,
    dense_network,
    train,
)
from sparsekit.tasks.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Batching,
    ImageBatches,
    cache_directory,
    into_cache,
    part,
)

File = Literal["train", "test"]

Architecture = Literal["resnet18", "resnet20", "resnet32", "resnet44", "resnet56", "vgg11", "preact-resnet18"]

#: The networks that are trained here: how each is made, and its recipe at 100 epochs. Those of VGG11 and the
#: pre-activation ResNet-18 are Laurent et al.'s (2020) at their 300 and 200 epochs, with a step every 60 and 70.
TRAINED = {
    "resnet18": (resnet18, RESIDUAL),
    "vgg11": (vgg11, StepwiseRecipe(100, 0.01, 128, 5e-4, decay_every=20)),
    "preact-resnet18": (preact_resnet18, StepwiseRecipe(100, 0.1, 128, 5e-4, decay_every=35)),
}

#: Raised with a change of these networks: cached networks are then trained anew.
RECIPE_VERSION = 1


class Cifar10Settings(TaskSettings):
    """Settings of `cifar10`."""

    architecture: Literal["resnet18", "resnet20", "resnet32", "resnet44", "resnet56", "vgg11", "preact-resnet18"] = (
        Field(
            "resnet20",
            description="of the checkpoint; without one, resnet18, vgg11 and preact-resnet18 are trained first",
        )
    )
    epochs: int = Field(100, ge=1, description="of that training; steps of its learning rate keep their proportion")
    download: bool = Field(False, description="let torchvision download the data into data_dir")


class Cifar10(Task[Cifar10Settings]):
    """CIFAR-10 (Krizhevsky, 2009), as torchvision's files or a parquet folder: 50,000 training images; the 10,000
    test images split into tuning (even indices) and reporting (odd).
    """  # noqa: D205

    name: ClassVar[str] = "cifar10"
    Settings: ClassVar[type[TaskSettings]] = Cifar10Settings
    likelihood = Categorical()
    finetune: ClassVar[FinetuneSettings] = FinetuneSettings(epochs=0, learning_rate=0.02)

    def __init__(self, settings: Cifar10Settings) -> None:
        super().__init__(settings)
        trains = settings.architecture in TRAINED
        if settings.checkpoint is None and not trains:
            raise DataError(
                f"the task 'cifar10' prunes a trained {settings.architecture}; give its weights by --checkpoint"
            )
        check_checkpoint(settings.checkpoint, trains=trains)
        if settings.data_dir is None:
            raise DataError("the task 'cifar10' needs --data-dir: torchvision's folder or one of parquet files")
        self._root = Path(settings.data_dir)
        if not self._root.is_dir() and not settings.download:
            raise DataError(f"there is no data directory '{self._root}'")
        self._parquet = any(self._root.glob("test-*.parquet"))
        if not (self._parquet or settings.download or (self._root / "cifar-10-batches-py").is_dir()):
            raise DataError(
                f"'{self._root}' holds neither train-*.parquet and test-*.parquet nor cifar-10-batches-py; give "
                "another --data-dir, or set task.download=true where there is a network"
            )
        self._decoded: dict[File, tuple[Tensor, Tensor]] = {}

    def network(self) -> nn.Module:
        """The architecture, untrained, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            if self.settings.architecture in TRAINED:
                return TRAINED[self.settings.architecture][0](10)
            return resnet(int(self.settings.architecture.removeprefix("resnet")))

    def model(self) -> nn.Module:
        """The network with the weights of `checkpoint`; one of `TRAINED` is read from the cache, or trained.

        That is for a GPU: an epoch of a ResNet-18 takes 17 minutes on one core.
        """
        recipe = TRAINED[self.settings.architecture][1] if self.settings.architecture in TRAINED else RESIDUAL
        epochs = self.settings.epochs
        if isinstance(recipe, StepwiseRecipe):
            recipe = replace(recipe, decay_every=max(1, round(recipe.decay_every * epochs / recipe.epochs)))
        recipe = replace(recipe, epochs=epochs)
        return dense_network(
            self,
            lambda: self._cached_network(recipe),
            lambda model: train(model, self, recipe, self._cached_network(recipe)),
        )

    def _cached_network(self, recipe: Recipe) -> Path:
        images, labels = self._arrays("train")
        digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        return cached_network(self, f"{self.name}-{self.settings.architecture}-v{RECIPE_VERSION}", recipe, digest)

    def size(self, split: Split) -> int:
        """From the files' headers where they have one."""
        file: File = "train" if split == "train" else "test"
        if self._parquet and file not in self._decoded:
            count = sum(_rows(path) for path in self._files(file))
        else:
            count = len(self._arrays(file)[1])
        return len(range(count)[part(split)])

    def batches(self, split: Split, **how: Unpack[Batching]) -> ImageBatches:
        images, labels = self._arrays("train" if split == "train" else "test")
        return ImageBatches(
            images[part(split)],
            labels[part(split)],
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            **how,
        )

    def fingerprint(self) -> str:
        """A hash of the contents of all data files, in the order of their names."""
        digest = hashlib.sha256()
        for path in (*self._files("train"), *self._files("test")):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _files(self, file: File) -> list[Path]:
        if self._parquet:
            found = sorted(self._root.glob(f"{file}-*.parquet"))
            if not found:
                raise DataError(f"'{self._root}' holds no {file}-*.parquet; put them there or give another --data-dir")
            return found
        pattern, needed = ("data_batch_*", 5) if file == "train" else ("test_batch", 1)
        folder = self._root / "cifar-10-batches-py"
        if len(list(folder.glob(pattern))) < needed:
            # Fetched, or refused, here: a fingerprint of files that are yet to come would be one of nothing.
            self._from_torchvision(file)
        return sorted(folder.glob(pattern))

    def _arrays(self, file: File) -> tuple[Tensor, Tensor]:
        """(N, 3, 32, 32) uint8 and (N,) int64, decoded once."""
        if file not in self._decoded:
            images, labels = self._from_parquet(file) if self._parquet else self._from_torchvision(file)
            self._decoded[file] = (
                torch.from_numpy(images).movedim(-1, 1).contiguous(),
                torch.from_numpy(labels),
            )
        return self._decoded[file]

    def _from_torchvision(self, file: File) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        from torchvision.datasets import CIFAR10

        try:
            data = CIFAR10(str(self._root), train=file == "train", download=self.settings.download)
        except (RuntimeError, OSError) as error:  # damaged or incomplete, or no network to download by
            raise DataError(
                f"torchvision cannot read CIFAR-10 in '{self._root}' ({error}); put a whole cifar-10-batches-py "
                "there, or set task.download=true where there is a network"
            ) from error
        return data.data, np.asarray(data.targets, dtype=np.int64)

    def _from_parquet(self, file: File) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        paths = self._files(file)
        # Decoding takes seconds a shard; what was decoded is known by its files' names, sizes and times.
        known = "".join(f"{p.resolve()} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in paths)
        cached = cache_directory() / f"cifar10-{file}-{hashlib.sha256(known.encode()).hexdigest()[:16]}.npz"
        try:
            with cached.open("rb") as stored, np.load(stored) as arrays:  # numpy leaves its own open if damaged
                return arrays["images"], arrays["labels"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # not there yet, or not whole
        with into_cache(cached) as temporary:  # a cache that cannot be written is said before decoding
            images, labels = _decode(paths)
            with temporary.open("wb") as out:
                np.savez(out, images=images, labels=labels)
        return images, labels


def _rows(path: Path) -> int:
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        raise _unreadable(path, error) from error


def _decode(paths: list[Path]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(N, 32, 32, 3) uint8 and (N,) int64, the files one after the other."""
    import pyarrow.parquet as pq

    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for path in paths:
        try:
            table = pq.read_table(path)
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        column = next((name for name in ("img", "image") if name in table.column_names), None)
        if column is None or "label" not in table.column_names:
            raise DataError(
                f"'{path}' has the columns {', '.join(table.column_names)}; 'img' or 'image', and 'label', were "
                "needed: rename them or give another --data-dir"
            )
        classes = table["label"].to_pylist()
        if not all(isinstance(c, int) and 0 <= c < 10 for c in classes):
            raise DataError(f"'{path}' has labels outside 0 to 9; the classes of CIFAR-10 were needed: mend the file")
        try:
            with ThreadPoolExecutor() as pool:  # the decoders release the interpreter's lock
                images += pool.map(_pixels, table[column].to_pylist())
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise _unreadable(path, error) from error
        labels += classes
    if not images:
        raise DataError(f"'{paths[0]}' holds no images; give another --data-dir")
    return np.stack(images), np.asarray(labels, dtype=np.int64)


def _pixels(cell: Mapping[str, bytes]) -> NDArray[np.uint8]:
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))
    if pixels.shape != (32, 32, 3):
        raise ValueError(f"an image is {pixels.shape[1]} × {pixels.shape[0]}, 32 × 32 was needed")
    return pixels


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"'{path}' cannot be read ({type(error).__name__}: {error}); a parquet file of encoded 32 × 32 images was "
        "needed: fetch it anew or give another --data-dir"
    )
