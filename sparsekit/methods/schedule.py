"""The interface of schedules: how sparsity grows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic

from sparsekit.methods.settings import Settings, SettingsT


class Schedule(ABC, Generic[SettingsT]):
    """How sparsity grows from one level to the next."""

    name: ClassVar[str]
    Settings: ClassVar[type[Settings]] = Settings

    def __init__(self, settings: SettingsT) -> None:
        self.settings = settings

    @abstractmethod
    def sparsities(self, start: float, target: float, steps: int) -> Sequence[float]:
        """`steps` sparsities, increasing, the last of them `target`; `start` is not among them."""
