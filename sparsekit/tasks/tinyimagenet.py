"""`tinyimagenet`: ResNet-18, trained here on first use, on Tiny ImageNet as published."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from sparsekit.errors import DataError
from sparsekit.methods.interfaces import FinetuneSettings, Split, Task, TaskSettings
from sparsekit.models import resnet18
from sparsekit.problem.likelihoods import Categorical
from sparsekit.tasks.dense import RESIDUAL, Recipe, cached_network, check_checkpoint, dense_network, train
from sparsekit.tasks.folders import Sample, decode, file_digest
from sparsekit.tasks.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Batching,
    ImageBatches,
    cache_directory,
    into_cache,
    part,
)

Folder = Literal["train", "val"]

#: Pixels a side.
SIDE = 64
#: Raised with a change of the network: cached ones are then trained anew.
RECIPE_VERSION = 1


class TinyImageNetSettings(TaskSettings):
    """Settings of `tinyimagenet`."""

    epochs: int = Field(100, ge=1, description="of the dense network's training")


class TinyImageNet(Task[TinyImageNetSettings]):
    """Tiny ImageNet (Le and Yang, 2015): 100,000 training images of 64 × 64 pixels in 200 classes; the 10,000
    validation images, in the order of their annotations, split into tuning (even indices) and reporting (odd).

    `data_dir` is tiny-imagenet-200 as published: wnids.txt, train/<wnid>/images/*.JPEG, val/images/*.JPEG and
    val/val_annotations.txt. Classes are numbered in the order of their sorted names, as torchvision's ImageFolder does.
    Decoded images lie memory-mapped in the cache (1.4 GB).
    """  # noqa: D205

    name: ClassVar[str] = "tinyimagenet"
    Settings: ClassVar[type[TaskSettings]] = TinyImageNetSettings
    likelihood = Categorical()
    finetune: ClassVar[FinetuneSettings] = FinetuneSettings(epochs=0, learning_rate=0.02)

    def __init__(self, settings: TinyImageNetSettings) -> None:
        super().__init__(settings)
        check_checkpoint(settings.checkpoint)
        if settings.data_dir is None:
            raise DataError("the task 'tinyimagenet' needs --data-dir: the folder tiny-imagenet-200 as published")
        self._root = Path(settings.data_dir)
        if not self._root.is_dir():
            raise DataError(f"there is no data directory '{self._root}'")
        needed = ("wnids.txt", "train", "val/images", "val/val_annotations.txt")
        missing = [name for name in needed if not (self._root / name).exists()]
        if missing:
            raise DataError(
                f"'{self._root}' holds no {', '.join(missing)}; tiny-imagenet-200 as published was needed: give "
                "another --data-dir"
            )
        self._listed: dict[Folder, Sequence[Sample]] = {}
        self._decoded: dict[Folder, Tensor] = {}

    @cached_property
    def _classes(self) -> list[str]:
        names = sorted(set((self._root / "wnids.txt").read_text().split()))
        if not names:
            raise DataError(f"'{self._root / 'wnids.txt'}' names no classes; one a line was needed: fetch it anew")
        return names

    def network(self) -> nn.Module:
        """`resnet18` with as many classes as there are, untrained, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return resnet18(len(self._classes))

    def model(self) -> nn.Module:
        """The network with the weights of `checkpoint`, else from the cache, else trained (for a GPU)."""
        recipe = replace(RESIDUAL, epochs=self.settings.epochs)
        return dense_network(
            self,
            lambda: self._cached_network(recipe),
            lambda model: train(model, self, recipe, self._cached_network(recipe)),
        )

    def _cached_network(self, recipe: Recipe) -> Path:
        return cached_network(self, f"{self.name}-resnet18-v{RECIPE_VERSION}", recipe, self._digest("train"))

    def size(self, split: Split) -> int:
        """The number of examples; files are listed, not read."""
        return len(self._samples(_folder(split))[part(split)])

    def batches(self, split: Split, **how: Unpack[Batching]) -> ImageBatches:
        labels = torch.tensor([label for _, label in self._samples(_folder(split))])
        return ImageBatches(
            self._images(_folder(split))[part(split)],
            labels[part(split)],
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            **how,
        )

    def fingerprint(self) -> str:
        """A hash of all labels and of the image files' names and sizes, not of their contents."""
        return hashlib.sha256((self._digest("train") + self._digest("val")).encode()).hexdigest()

    def _digest(self, folder: Folder) -> str:
        samples = self._samples(folder)
        labels = str([label for _, label in samples])
        return hashlib.sha256((labels + file_digest(self._root, (path for path, _ in samples))).encode()).hexdigest()

    def _samples(self, folder: Folder) -> Sequence[Sample]:
        if folder not in self._listed:
            self._listed[folder] = self._training() if folder == "train" else self._annotated()
        return self._listed[folder]

    def _training(self) -> list[Sample]:
        samples = []
        for label, name in enumerate(self._classes):
            found = sorted((self._root / "train" / name / "images").glob("*.JPEG"))
            if not found:
                raise DataError(
                    f"'{self._root}' holds no train/{name}/images/*.JPEG, a class that wnids.txt names; put them there"
                )
            samples += [(str(path), label) for path in found]
        return samples

    def _annotated(self) -> list[Sample]:
        annotations = self._root / "val" / "val_annotations.txt"
        numbers = {name: label for label, name in enumerate(self._classes)}
        samples = []
        for line in annotations.read_text().splitlines():
            image, name, *_ = [*line.split("\t"), ""]
            path = self._root / "val" / "images" / image
            if name not in numbers or not path.is_file():
                raise DataError(
                    f"'{annotations}' has the line '{line}'; an image of val/images and a class of wnids.txt, parted "
                    "by a tab, were needed: fetch it anew"
                )
            samples.append((str(path), numbers[name]))
        if not samples:
            raise DataError(f"'{annotations}' names no images; fetch it anew or give another --data-dir")
        return samples

    def _images(self, folder: Folder) -> Tensor:
        """(N, 3, 64, 64) uint8, memory-mapped; decoded once."""
        if folder not in self._decoded:
            paths = [path for path, _ in self._samples(folder)]
            # Decoding takes a minute; what was decoded is known by its files' names, sizes and times.
            known = hashlib.sha256(f"{self._root.resolve()} {file_digest(self._root, paths, times=True)}".encode())
            cached = cache_directory() / f"{self.name}-{folder}-{known.hexdigest()[:16]}.npy"
            array = _mapped(cached, len(paths))
            if array is None:
                with into_cache(cached) as temporary:  # a cache that cannot be written is said before decoding
                    _decode(paths, temporary)
                array = np.load(cached, mmap_mode="c")
            self._decoded[folder] = torch.from_numpy(array)
        return self._decoded[folder]


def _folder(split: Split) -> Folder:
    return "train" if split == "train" else "val"


def _mapped(path: Path, count: int) -> NDArray[np.uint8] | None:
    try:
        array: NDArray[np.uint8] = np.load(path, mmap_mode="c")  # torch warns of arrays that cannot be written
    except (OSError, ValueError, EOFError):  # not there yet, or not whole
        return None
    return array if array.shape == (count, 3, SIDE, SIDE) else None


def _decode(paths: Sequence[str], to: Path) -> None:
    array = np.lib.format.open_memmap(to, mode="w+", dtype=np.uint8, shape=(len(paths), 3, SIDE, SIDE))
    with ThreadPoolExecutor() as pool:  # the decoders release the interpreter's lock
        for row, pixels in enumerate(pool.map(_pixels, paths)):
            array[row] = pixels
    array.flush()


def _pixels(path: str) -> NDArray[np.uint8]:
    """(3, 64, 64) uint8."""
    pixels = np.asarray(decode(path))
    if pixels.shape != (SIDE, SIDE, 3):
        raise DataError(
            f"'{path}' is of {pixels.shape[1]} × {pixels.shape[0]} pixels, {SIDE} × {SIDE} was needed: fetch it anew "
            "or give another --data-dir"
        )
    return pixels.transpose(2, 0, 1)
