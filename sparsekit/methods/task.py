"""The interface of tasks: a trained network, its data and its metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar, Generic, Literal

import torch
from pydantic import Field
from torch import nn

from sparsekit.methods.settings import FinetuneSettings, Settings, SettingsT
from sparsekit.problem.likelihoods import Likelihood
from sparsekit.problem.measurement import measure
from sparsekit.problem.objective import Batch

Split = Literal["train", "tuning", "reporting"]


class TaskSettings(Settings):
    """The settings of every task. A task adds its own."""

    data_dir: str | None = Field(None, description="folder of the data set; --data-dir sets it")
    checkpoint: str | None = Field(None, description="file of the dense weights; --checkpoint sets it")
    seed: int = Field(0, description="seed of the dense network's training, where the task trains one")


class Task(ABC, Generic[SettingsT]):
    """A trained network, its data and its metrics.

    The constructor is cheap: it reads only what is needed to say that a file or folder is missing.

    Attributes:
        settings: of the class's `Settings`.
        progress: called with (steps done, steps in all) where `model` trains; a run sets it.
        device: where `model` trains; a run sets it.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[TaskSettings]] = TaskSettings
    likelihood: Likelihood
    #: The default settings of fine-tuning.
    finetune: ClassVar[FinetuneSettings] = FinetuneSettings()
    #: The run's default sparsities.
    sparsity: ClassVar[tuple[float, ...]] = (0.9,)

    def __init__(self, settings: SettingsT) -> None:
        self.settings = settings
        self.progress: Callable[[int, int], None] = lambda done, total: None
        self.device = torch.device("cpu")

    @abstractmethod
    def network(self) -> nn.Module:
        """The architecture with untrained weights; reads no data. `--dry-run` uses only this."""

    @abstractmethod
    def model(self) -> nn.Module:
        """The trained dense network, on the CPU, in evaluation mode; a new object at each call."""

    @abstractmethod
    def size(self, split: Split) -> int:
        """The number of examples of a split."""

    @abstractmethod
    def batches(
        self,
        split: Split,
        *,
        batch_size: int,
        limit: int | None = None,
        generator: torch.Generator | None = None,
        augment: bool = False,
    ) -> Iterable[Batch]:
        """Batches of (inputs, targets) on the CPU.

        Args:
            split: training examples, or the tuning or the reporting half of the test examples.
            batch_size: the last batch may be short.
            limit: largest number of examples.
            generator: a CPU generator; with it the order is random (drawn anew at each iteration), and with
                `limit` a random subset. Without it, stored order.
            augment: whether the task's training augmentation is applied; needs the generator.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the task's data, part of a run's identity."""

    def measure(self, model: nn.Module, split: Split) -> dict[str, float]:
        """The mean loss, and top-1 accuracy as a fraction where the likelihood has one."""
        return measure(model, self.likelihood, self.batches(split, batch_size=100))
