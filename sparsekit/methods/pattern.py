"""The interface of patterns: which weights may be removed together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol

from torch import Tensor

from sparsekit.methods.settings import Settings, SettingsT
from sparsekit.problem.parameters import Mask, ParameterSpace


@dataclass(frozen=True)
class Units:
    """Groups of weights that a pattern removes or keeps together.

    Attributes:
        index: (m, B), coordinates of the groups; no weight is in two of them.
        removed: number of weights removed from each group once the pattern is complete.
    """

    index: Tensor
    removed: int


class Trial(Protocol):
    """Measures what a cut would do, and leaves everything as it was."""

    def __call__(self, chosen: Tensor, examples: int) -> float:
        """What it costs where the weights `chosen`, (n,) bool, go and others compensate as in the run.

        The divergence of the network's predictions from those before, in units of the mean loss, on so many of the
        calibration examples, rounded up to whole batches. Where the likelihood knows none, the increase of the loss.
        """
        ...


class Pattern(ABC, Generic[SettingsT]):
    """Which sets of weights may be removed together."""

    name: ClassVar[str]
    #: Whether scores of different tensors are compared; where not, the scores of a tensor may have any scale.
    across_layers: ClassVar[bool] = True
    Settings: ClassVar[type[Settings]] = Settings

    def __init__(self, settings: SettingsT) -> None:
        self.settings = settings

    @abstractmethod
    def count(self, space: ParameterSpace, sparsity: float) -> int:
        """The exact number of weights that are removed in all at this sparsity.

        Raises:
            SettingsError: the pattern cannot reach the sparsity.
        """

    def units(self, space: ParameterSpace) -> Units | None:
        """The groups of the pattern; by default None: weights are removed one by one."""
        return None

    @classmethod
    def has_groups(cls) -> bool:
        """Whether the pattern has groups."""
        return cls.units is not Pattern.units

    def rescore(self, scores: Tensor, mask: Mask, space: ParameterSpace, trial: Trial) -> Tensor:
        """(n,) the scores to choose by; by default those of the saliency.

        For patterns that try before they choose. Where levels begin at the same weights it is called for the first.
        """
        return scores

    @abstractmethod
    def choose(self, scores: Tensor, mask: Mask, count: int, space: ParameterSpace) -> Tensor:
        """(n,) bool: the kept weights to remove now, so that `count` are removed in all.

        Ties are broken by index, so that the choice does not depend on a device's sort.
        """
