"""MNIST's idx files, as published or as torchvision lays them out."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sparsekit.errors import DataError

File = Literal["train", "t10k"]


class MnistFiles:
    """Images and labels, each file read once, when it is asked for.

    Args:
        task: its name, for what is said of a missing folder.
        data_dir: holds the files, plain or .gz, or `MNIST/raw` with them.
        download: whether torchvision may fetch them.

    Raises:
        DataError: there is no such folder, or it holds neither layout; at the first use, a file that is not there,
            not whole or of another kind.
    """

    def __init__(self, task: str, data_dir: str | None, *, download: bool) -> None:
        if data_dir is None:
            raise DataError(f"the task '{task}' needs --data-dir: a folder of MNIST's idx files, or torchvision's")
        self._root, self._may_download = Path(data_dir), download
        if not self._root.is_dir() and not download:
            raise DataError(f"there is no data directory '{self._root}'")
        images = [self._found(f"{file}-images-idx3-ubyte") for file in ("train", "t10k")]
        if not (download or any(images)):
            raise DataError(
                f"'{self._root}' holds neither train-images-idx3-ubyte and t10k-images-idx3-ubyte (plain or .gz) nor "
                "MNIST/raw; give another --data-dir, or set task.download=true where there is a network"
            )
        self._images: dict[File, Tensor] = {}
        self._labels: dict[File, Tensor] = {}

    def images(self, file: File) -> Tensor:
        """(N, 1, 28, 28) uint8."""
        if file not in self._images:
            self._images[file] = _read(self._path(f"{file}-images-idx3-ubyte"), (28, 28)).unsqueeze(1)
        return self._images[file]

    def labels(self, file: File) -> Tensor:
        """(N,) int64, in 0 … 9, one for each image."""
        if file not in self._labels:
            path = self._path(f"{file}-labels-idx1-ubyte")
            labels, images = _read(path, ()).long(), self.images(file)
            if len(labels) != len(images) or int(labels.max()) > 9:
                raise DataError(
                    f"'{path}' holds {len(labels)} labels up to {int(labels.max())}; one from 0 to 9 for each of "
                    f"{len(images)} images was needed: fetch it anew or give another --data-dir"
                )
            self._labels[file] = labels
        return self._labels[file]

    def digest(self, *files: File, labels: bool) -> str:
        """A hash of all pixels in their order, however they are packed, and of the labels."""
        digest = hashlib.sha256()
        for file in files:
            digest.update(self.images(file).numpy().tobytes())
            if labels:
                digest.update(self.labels(file).numpy().tobytes())
        return digest.hexdigest()

    def _found(self, name: str) -> Path | None:
        folders = self._root, self._root / "MNIST" / "raw"
        candidates = [folder / f"{name}{suffix}" for folder in folders for suffix in ("", ".gz")]
        return next((path for path in candidates if path.is_file()), None)

    def _path(self, name: str) -> Path:
        path = self._found(name)
        if path is None and self._may_download:
            self._download()
            path = self._found(name)
        if path is None:
            raise DataError(f"'{self._root}' holds no {name}, plain or .gz; put it there or give another --data-dir")
        return path

    def _download(self) -> None:
        from torchvision.datasets import MNIST

        try:
            MNIST(str(self._root), download=True)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"torchvision cannot download MNIST into '{self._root}' ({error}); put its idx files there"
            ) from error


def _read(path: Path, item: tuple[int, ...]) -> Tensor:
    """(N, *item) uint8 from an idx file; one that holds another kind or size of item is refused."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"'{path}' cannot be read ({error}): fetch it anew or give another --data-dir") from error
    header = 4 * (2 + len(item))  # the kind (bytes, in so many dimensions), then the sizes
    kind, count, *size = np.frombuffer(content[:header], ">u4").tolist() if len(content) >= header else (0, 0)
    whole = len(content) == header + count * int(np.prod(item, dtype=int))
    if kind != 0x801 + len(item) or tuple(size) != item or not count or not whole:
        wanted = f"{' × '.join(map(str, item))} images" if item else "labels"
        raise DataError(
            f"'{path}' holds no {wanted} of bytes, or not as many as it says; MNIST's idx file was needed: "
            "fetch it anew or give another --data-dir"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy()).view(count, *item)
