"""`autoencoder`: a deep autoencoder of MNIST, trained here on first use."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from sparsekit.errors import DataError
from sparsekit.interfaces import FinetuneSettings, Split, Task, TaskSettings
from sparsekit.likelihoods import Bernoulli
from sparsekit.models import Autoencoder
from sparsekit.objective import as_found
from sparsekit.tasks.dense import Recipe, dense_network, train
from sparsekit.tasks.images import ImageBatches, MappedBatches, cache_directory, part

File = Literal["train", "t10k"]

#: 58.6 nats and a squared error of 3.5 per image were found on the reporting half, after a quarter of an hour.
RECIPE = Recipe(epochs=20, learning_rate=1e-3, batch_size=128)
#: Raised with a change of architecture: cached networks are then trained anew.
RECIPE_VERSION = 1
#: The kind of an idx file of bytes in three dimensions, and the size of such a file's header.
MAGIC, HEADER = 0x803, 16


class AutoencoderSettings(TaskSettings):
    """Settings of `autoencoder`."""

    download: bool = Field(False, description="let torchvision download the data into data_dir")


class MnistAutoencoder(Task):
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

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        if settings.checkpoint is not None and not Path(settings.checkpoint).is_file():
            raise DataError(f"there is no checkpoint file '{settings.checkpoint}'; leave it out to train one")
        if settings.data_dir is None:
            raise DataError("the task 'autoencoder' needs --data-dir: a folder of MNIST's idx files, or torchvision's")
        self._root = Path(settings.data_dir)
        if not self._root.is_dir() and not settings.download:
            raise DataError(f"there is no data directory '{self._root}'")
        if not (settings.download or self._found("train") or self._found("t10k")):
            raise DataError(
                f"'{self._root}' holds neither train-images-idx3-ubyte and t10k-images-idx3-ubyte (plain or .gz) nor "
                "MNIST/raw; give another --data-dir, or set task.download=true where there is a network"
            )
        self._decoded: dict[File, Tensor] = {}

    def network(self) -> nn.Module:
        """`Autoencoder`, untrained, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return Autoencoder()

    def model(self) -> nn.Module:
        """From `checkpoint`, else from the cache, else trained here (a quarter of an hour)."""
        return dense_network(
            self, self._cached_network, lambda model: train(model, self, RECIPE, self._cached_network())
        )

    def _cached_network(self) -> Path:
        data = self._digest("train")[:8]  # other images in MNIST's format have networks of their own
        name = f"autoencoder-v{RECIPE_VERSION}-{RECIPE.hash}-{data}-seed{self.settings.seed}.safetensors"
        return cache_directory() / name

    def size(self, split: Split) -> int:
        return len(self._part(split))

    def _part(self, split: Split) -> Tensor:
        return self._images("train" if split == "train" else "t10k")[part(split)]

    def batches(
        self,
        split: Split,
        *,
        batch_size: int,
        limit: int | None = None,
        generator: torch.Generator | None = None,
        augment: bool = False,
    ) -> MappedBatches:
        """(pixels, pixels), each (b, 784) in [0, 1]; there is no augmentation."""
        images = self._part(split)
        batches = ImageBatches(
            images,
            torch.zeros(len(images), dtype=torch.long),
            mean=(0.0,),
            std=(1.0,),
            batch_size=batch_size,
            limit=limit,
            generator=generator,
        )
        return MappedBatches(batches, lambda pixels, _: (pixels.flatten(1), pixels.flatten(1)))

    def fingerprint(self) -> str:
        """Of all pixels in their order, however they are packed."""
        return self._digest("train", "t10k")

    def _digest(self, *files: File) -> str:
        digest = hashlib.sha256()
        for file in files:
            digest.update(self._images(file).numpy().tobytes())
        return digest.hexdigest()

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

    def _found(self, file: File) -> Path | None:
        name = f"{file}-images-idx3-ubyte"
        folders = self._root, self._root / "MNIST" / "raw"
        candidates = [folder / f"{name}{suffix}" for folder in folders for suffix in ("", ".gz")]
        return next((path for path in candidates if path.is_file()), None)

    def _images(self, file: File) -> Tensor:
        """(N, 1, 28, 28) uint8, read once."""
        if file not in self._decoded:
            path = self._found(file)
            if path is None and self.settings.download:
                self._download()
                path = self._found(file)
            if path is None:
                raise DataError(
                    f"'{self._root}' holds no {file}-images-idx3-ubyte, plain or .gz; put it there or give another "
                    "--data-dir"
                )
            self._decoded[file] = _read(path).unsqueeze(1)
        return self._decoded[file]

    def _download(self) -> None:
        from torchvision.datasets import MNIST

        try:
            MNIST(str(self._root), download=True)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"torchvision cannot download MNIST into '{self._root}' ({error}); put its idx files there"
            ) from error


def _read(path: Path) -> Tensor:
    """(N, 28, 28) uint8 from an idx file."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"'{path}' cannot be read ({error}): fetch it anew or give another --data-dir") from error
    magic, count, *size = np.frombuffer(content[:HEADER], ">u4").tolist() if len(content) >= HEADER else (0, 0)
    if magic != MAGIC or size != [28, 28] or not count or len(content) != HEADER + count * 784:
        raise DataError(
            f"'{path}' holds no 28 × 28 images of bytes, or not as many as it says; MNIST's idx file was needed: "
            "fetch it anew or give another --data-dir"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=HEADER).copy()).view(count, 28, 28)
