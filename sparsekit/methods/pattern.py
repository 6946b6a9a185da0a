"""What a plugin supplies as a pattern: which weights may be removed together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic

from torch import Tensor

from sparsekit.methods.settings import Settings, SettingsT
from sparsekit.problem.parameters import Mask, ParameterSpace


@dataclass(frozen=True)
class Units:
    """Groups of weights that a pattern decides on together.

    Attributes:
        index: (m, B), coordinates of the groups; no weight is in two of them.
        removed: how many of each group go once the pattern is complete.
    """

    index: Tensor
    removed: int


class Pattern(ABC, Generic[SettingsT]):
    """Which sets of weights may be removed together."""

    name: ClassVar[str]
    #: Whether scores of different tensors are compared; where they are not, any scale within a tensor will do.
    across_layers: ClassVar[bool] = True
    Settings: ClassVar[type[Settings]] = Settings

    def __init__(self, settings: SettingsT) -> None:
        self.settings = settings

    @abstractmethod
    def count(self, space: ParameterSpace, sparsity: float) -> int:
        """How many weights are removed in all at this sparsity, exactly.

        Raises:
            SettingsError: the pattern cannot reach the sparsity.
        """

    def units(self, space: ParameterSpace) -> Units | None:
        """The groups that are decided on together; by default None, weights go one by one."""
        return None

    @classmethod
    def has_groups(cls) -> bool:
        """Whether it decides on groups."""
        return cls.units is not Pattern.units

    @abstractmethod
    def choose(self, scores: Tensor, mask: Mask, count: int, space: ParameterSpace) -> Tensor:
        """(n,) bool: the kept weights to remove now, so that `count` are removed in all.

        Ties are broken by index, so that the choice does not depend on a device's sort.
        """
