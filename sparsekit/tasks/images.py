"""Batches of images in memory, and the cache of tasks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Required, TypedDict

import platformdirs
import torch
from torch import Tensor

from sparsekit.errors import DataError, RecordError
from sparsekit.files import replacing
from sparsekit.methods.interfaces import Split
from sparsekit.problem.objective import Batch

#: Mean and standard deviation by channel, of pixels scaled to [0, 1]; usual for all sets of natural images.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def cache_directory() -> Path:
    """$SPARSEKIT_CACHE, or the platform's folder for caches."""
    return Path(os.environ.get("SPARSEKIT_CACHE") or platformdirs.user_cache_dir("sparsekit"))


def part(split: Split) -> slice:
    """The rows of a split in its file: all training examples, or the even or odd test examples."""
    return {"train": slice(None), "tuning": slice(0, None, 2), "reporting": slice(1, None, 2)}[split]


@contextmanager
def into_cache(path: Path) -> Iterator[Path]:
    """A temporary file in the cache, which replaces `path` on exit and is deleted after an error.

    Raises:
        DataError: the cache cannot be written; raised on entry where the folder cannot be used.
    """
    try:
        with replacing(path) as temporary:
            yield temporary
    except RecordError as error:
        raise DataError(
            f"the cache cannot be written: {error}, or set the environment variable SPARSEKIT_CACHE to a folder "
            "that can be written"
        ) from error


class Batching(TypedDict, total=False):
    """The arguments of `Task.batches` beside the split."""

    batch_size: Required[int]
    limit: int | None
    generator: torch.Generator | None
    augment: bool


def without_augmentation(how: Batching) -> Batching:
    """The same for a task without augmentation, which ignores the argument."""
    return {**how, "augment": False}


class Order:
    """The indices of a pass, batch by batch; can be iterated over again.

    Args:
        count: of all examples.
        batch_size: the last batch may be short.
        limit: largest number of examples; with a generator a random subset in a random order, both fixed here.
        generator: on the CPU; without `limit` each iteration draws a new order. None: the order of the data.
    """

    def __init__(self, count: int, *, batch_size: int, limit: int | None, generator: torch.Generator | None) -> None:
        self._count, self._batch_size, self._generator = count, batch_size, generator
        self._fixed: Tensor | None = None
        if limit is not None:
            self._fixed = self._drawn()[:limit]
        elif generator is None:
            self._fixed = torch.arange(count)

    def _drawn(self) -> Tensor:
        return (
            torch.arange(self._count)
            if self._generator is None
            else torch.randperm(self._count, generator=self._generator)
        )

    def __iter__(self) -> Iterator[Tensor]:
        order = self._drawn() if self._fixed is None else self._fixed
        if len(order):  # torch splits an empty tensor into one empty part
            yield from order.split(self._batch_size)


class ImageBatches:
    """Batches of normalised images from uint8 storage; can be iterated over again.

    Args:
        images: (N, C, h, w) uint8.
        labels: (N,) int64.
        mean, std: by channel, of pixels scaled to [0, 1].
        batch_size, limit, generator: see `Order`.
        augment: shift by up to `padding` pixels and, with `mirror`, mirror at random; needs the generator.
        padding, mirror: see `augment`.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        batch_size: int,
        limit: int | None = None,
        generator: torch.Generator | None = None,
        augment: bool = False,
        padding: int = 4,
        mirror: bool = True,
    ) -> None:
        if augment and generator is None:
            raise ValueError("augmentation draws at random and needs a generator")
        self._images, self._labels = images, labels
        self._mean, self._std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        self._generator, self._augment, self._padding, self._mirror = generator, augment, padding, mirror
        self._order = Order(len(labels), batch_size=batch_size, limit=limit, generator=generator)

    def __iter__(self) -> Iterator[Batch]:
        for indices in self._order:
            pixels = self._images[indices]
            if self._augment:
                pixels = self._shifted(pixels)
            yield (pixels.float() / 255 - self._mean) / self._std, self._labels[indices]

    def _shifted(self, pixels: Tensor) -> Tensor:
        """Zero padding, a random crop of the old size and, with `mirror`, a mirror image with probability ½."""
        p, (count, _, height, width) = self._padding, pixels.shape
        padded = torch.nn.functional.pad(pixels, (p, p, p, p))
        top, left = torch.randint(0, 2 * p + 1, (2, count, 1, 1, 1), generator=self._generator)
        mirrored = torch.rand(count, 1, generator=self._generator) < 0.5
        rows = top + torch.arange(height).view(1, 1, -1, 1)
        columns = torch.arange(width).expand(count, -1)
        columns = torch.where(mirrored & self._mirror, columns.flip(1), columns).view(count, 1, 1, -1) + left
        return padded[
            torch.arange(count).view(-1, 1, 1, 1),
            torch.arange(pixels.shape[1]).view(1, -1, 1, 1),
            rows,
            columns,
        ]


class MappedBatches:
    """Batches passed through a function, as often as they are iterated over."""

    def __init__(self, batches: Iterable[Batch], function: Callable[[Tensor, Tensor], Batch]) -> None:
        self._batches, self._function = batches, function

    def __iter__(self) -> Iterator[Batch]:
        for inputs, targets in self._batches:
            yield self._function(inputs, targets)
