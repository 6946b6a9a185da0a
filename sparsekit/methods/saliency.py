"""The interface of saliencies: scores, and the inputs that they may be computed from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Generic

import torch
from torch import Tensor

from sparsekit.curvature.vectors import FisherKind
from sparsekit.methods.pattern import Units
from sparsekit.methods.settings import Settings, SettingsT
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.removal import InverseFisher


class ScoreContext(ABC):
    """The inputs of a saliency; each is computed only when it is asked for."""

    @property
    @abstractmethod
    def weights(self) -> Tensor:
        """w, (n,)."""

    @property
    @abstractmethod
    def mask(self) -> Mask:
        """The mask before the cut."""

    @property
    @abstractmethod
    def inverse(self) -> InverseFisher:
        """Σ."""

    @property
    @abstractmethod
    def gradient(self) -> Tensor:
        """∇L(w), (n,), on the calibration examples."""

    def diagonal(self, fisher: FisherKind) -> Tensor:
        """Diag F at w, (n,), on the calibration examples; 'exact' is that of the Gauss-Newton matrix."""
        raise NotImplementedError(f"{type(self).__name__} does not give the Fisher's diagonal")

    @property
    def space(self) -> ParameterSpace:
        """The tensors that the weights come from."""
        raise NotImplementedError(f"{type(self).__name__} does not say which tensors its weights come from")

    @property
    @abstractmethod
    def units(self) -> Units | None:
        """The pattern's units, None where weights are removed one by one."""

    @property
    @abstractmethod
    def generator(self) -> torch.Generator:
        """The generator for saliencies that draw random numbers."""


class Saliency(ABC, Generic[SettingsT]):
    """Scores weights: the lowest are removed first."""

    name: ClassVar[str]
    #: Whether it scores the groups of a pattern, and so needs a pattern with groups.
    of_groups: ClassVar[bool] = False
    #: Whether it uses the gradient, and so needs examples even where the estimator uses none.
    takes_gradient: ClassVar[bool] = False
    Settings: ClassVar[type[Settings]] = Settings

    def __init__(self, settings: SettingsT) -> None:
        self.settings = settings

    def predicted(self, context: ScoreContext, delta: Tensor) -> float | None:
        """The change of the loss that the saliency's own model expects of a cut that moves the weights by δ, (n,).

        By default None: it has none, and the estimator's quadratic model is asked instead.
        """
        return None

    @abstractmethod
    def score(self, context: ScoreContext) -> Tensor:
        """(n,) scores; those of removed weights are ignored."""
