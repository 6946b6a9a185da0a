"""Images in folders, a file each; decoded when they are needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from sparsekit.errors import DataError
from sparsekit.problem.objective import Batch
from sparsekit.tasks.images import IMAGENET_MEAN, IMAGENET_STD, Order

#: The index of a file, and the seed of its augmentation if there is any.
Key = tuple[int, int | None]
#: A file and its label; a string, because a million Path objects take a gigabyte.
Sample = tuple[str, int]


def file_digest(root: Path, files: Iterable[str], *, times: bool = False) -> str:
    """A hash of the files' paths below `root` and sizes, with `times` also of their times; not of their content."""
    digest = hashlib.sha256()
    for path in files:
        found = os.stat(path)
        known = f"{Path(path).relative_to(root).as_posix()} {found.st_size}" + (
            f" {found.st_mtime_ns}" if times else ""
        )
        digest.update(f"{known}\n".encode())
    return digest.hexdigest()


class FolderBatches:
    """Batches of 224 × 224 images decoded on the fly; can be iterated over again.

    Without augmentation, the shorter side becomes 256 pixels and the centre is cropped; with it, a random crop is
    scaled and mirrored at random, as is usual for ImageNet. An image's random numbers do not depend on `workers`.

    Args:
        samples: image files and their labels.
        batch_size, limit, generator: see `Order`.
        augment: needs the generator.
        workers: processes that decode; 0: this process decodes.

    Raises:
        DataError: during iteration, if an image cannot be decoded.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        batch_size: int,
        limit: int | None = None,
        generator: torch.Generator | None = None,
        augment: bool = False,
        workers: int = 0,
    ) -> None:
        if augment and generator is None:
            raise ValueError("augmentation draws at random and needs a generator")
        self._order = Order(len(samples), batch_size=batch_size, limit=limit, generator=generator)
        self._images = _Images(samples)
        self._generator, self._augment, self._workers = generator, augment, workers

    def _keys(self) -> Iterator[list[Key]]:
        first = int(torch.randint(2**62, (), generator=self._generator)) if self._augment else None
        for indices in self._order:
            seeds = [None] * len(indices) if first is None else range(first, first + len(indices))
            yield list(zip(indices.tolist(), seeds, strict=True))
            first = None if first is None else first + len(indices)

    def __iter__(self) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            self._images,
            batch_sampler=self._keys(),
            num_workers=self._workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # the loader's own draw leaves the global generator alone
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch[0], batch[1]


class _Images(Dataset[Any]):
    """Decoded and transformed images with labels; for a damaged image, the error is returned.

    An error raised in a worker would have the worker's traceback as its message.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        from torchvision import transforms

        finish = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        self._samples = samples
        self._plain = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), *finish])
        self._random = transforms.Compose(
            [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *finish]
        )

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | DataError:
        index, seed = key
        path, label = self._samples[index]
        try:
            image = decode(path)
        except DataError as error:
            return error
        if seed is None:
            return self._plain(image), label
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(seed)
            return self._random(image), label


def _collate(found: list[tuple[Tensor, int] | DataError]) -> object:
    return next((one for one in found if isinstance(one, DataError)), None) or default_collate(found)


def decode(path: str) -> Any:
    """The image in RGB, a PIL image.

    Raises:
        DataError: it cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL raises all of them
        raise DataError(
            f"'{path}' cannot be read as an image ({type(error).__name__}: {error}): fetch it anew or give another "
            "--data-dir"
        ) from error
