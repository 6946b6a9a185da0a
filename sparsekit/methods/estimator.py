"""The interface of curvature estimators, which estimate Σ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Mapping
from math import inf
from typing import Any, ClassVar, Generic, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import TypeVar

from sparsekit.curvature.vectors import FisherKind
from sparsekit.errors import CurvatureError, SettingsError
from sparsekit.machine import Memory
from sparsekit.methods.settings import Settings
from sparsekit.problem.objective import Objective
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.removal import InverseFisher


class EstimatorSettings(Settings):
    """The settings of every curvature estimator. An estimator adds its own and may change defaults."""

    damping: float = Field(0.1, gt=0, description="γ, added to the Fisher's diagonal; see damping_scale")
    damping_scale: Literal["absolute", "relative"] = Field(
        "relative", description="relative: γ is `damping` times the mean of the Fisher's diagonal"
    )
    fisher: FisherKind = Field(
        "importance",
        description="importance: one column of the output curvature's root an example, drawn by its length; "
        "sampled: a label from the model; exact: all columns; empirical: the data's own labels",
    )
    examples: int = Field(
        1024, ge=1, description="calibration examples for each estimate; by default as many as there are, at most 1024"
    )
    batch_size: int = Field(32, ge=1, description="examples in one forward and backward pass")

    def fitting(self, available: int) -> int:
        """The largest `examples` that these settings allow where there are `available`; 0 where there is none."""
        return available


#: The class of an estimator's settings; Any where the estimator names none.
EstimatorSettingsT = TypeVar("EstimatorSettingsT", bound=EstimatorSettings, default=Any)


class CurvatureEstimator(ABC, Generic[EstimatorSettingsT]):
    """Estimates Σ ≈ (F + γI)⁻¹; it never changes weights, masks on the model, schedules, files or loggers.

    An estimator with settings of its own may name them for type checkers: `CurvatureEstimator[OwnSettings]`.

    Attributes:
        name: of the estimator.
        Settings: their class.
        run_defaults: settings of a run with this estimator where the user gives none, such as
            {"saliency": "obs-rows"}: what was measured to be best with it. Comparisons take only its saliency, because
            compensation, reconstruction and batch norm are the same for all that is compared.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[EstimatorSettings]] = EstimatorSettings
    run_defaults: ClassVar[Mapping[str, object]] = {}

    def __init__(self, space: ParameterSpace, settings: EstimatorSettingsT) -> None:
        self.space = space
        self.settings = settings

    @abstractmethod
    def update(self, objective: Objective, *, generator: torch.Generator) -> Mapping[str, float]:
        """Add the objective's examples at its present weights; return figures for the record.

        Called again at each refresh: an estimator then refines its estimate, or starts afresh if its method does. The
        objective's model must be left unchanged.
        """

    @abstractmethod
    def inverse(self, damping: float | None = None) -> InverseFisher:
        """Σ from the statistics so far; another damping reuses them where the method allows it."""

    def shrink(self, mask: Mask) -> None:  # noqa: B027 - following a cut is optional
        """Adapt to a cut. By default nothing is done: removal conditions on removed weights exactly."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The whole state after `update`, as tensors, so that a resumed run equals an uninterrupted one.

        A large tensor that is the same object as in the last checkpoint is written again only if torch's version
        counter has changed: change it by torch's in-place operations, not through `.data` or numpy.
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""

    def state_device(self, name: str, tensor: Tensor, device: torch.device) -> torch.device:
        """The device of a tensor of the state while the model is on `device`; a resumed run puts it there.

        By default the model's device. A checkpoint holds everything on the host, and only the estimator knows what
        stays there: rows that are paged in because they do not fit on the device must not all be put on it.
        """
        return device

    @classmethod
    def statistics(cls, settings: EstimatorSettingsT) -> Mapping[str, object]:
        """The settings that determine the state after a first `update`: all but the damping.

        Estimators that agree in them, and see the same examples at the same weights, may share that state by `adopt`.
        """
        return settings.model_dump(mode="json", exclude={"damping", "damping_scale"})

    def adopt(self, state: Mapping[str, Tensor]) -> bool:
        """Take over the state after the first `update` of another estimator with the same `statistics`.

        Afterwards this estimator is as after its own update. It returns False, and is unchanged, where the state does
        not suit its damping.
        """
        self.load_state_dict(state)
        return True

    @classmethod
    @abstractmethod
    def memory(cls, space: ParameterSpace, settings: EstimatorSettingsT) -> int:
        """Bytes of the state and the largest temporary, before anything is allocated."""

    @classmethod
    def describe(cls, space: ParameterSpace, settings: EstimatorSettingsT) -> Mapping[str, str]:
        """Name of a parameter -> how its curvature is modelled, for the record; empty where nothing differs."""
        return {}

    @classmethod
    def unit(cls, settings: EstimatorSettingsT) -> Literal["loss", "other", "layer"]:
        """The unit of scores and predicted increases, given the settings.

        loss: the network's loss; other: another unit, comparable across layers; layer: each layer has its own.
        """
        return "loss"

    #: Integer settings that increase the memory; a refusal names the values that would fit.
    memory_settings: ClassVar[tuple[str, ...]] = ("batch_size",)

    @classmethod
    def check(cls, model: nn.Module, space: ParameterSpace, settings: EstimatorSettingsT, available: Memory) -> None:
        """Refuse settings that cannot work before any gradient is computed.

        Args:
            model: the network, perhaps untrained; only its layers are used, not its weights.
            space: its prunable weights.
            settings: the estimator's.
            available: bytes that can be allocated.

        Raises:
            SettingsError: with the number that would fit.
        """
        cls.check_memory(available.device, settings, lambda given: cls.memory(space, given), space.size)

    @classmethod
    def check_memory(
        cls,
        available: int,
        settings: EstimatorSettingsT,
        memory: Callable[[EstimatorSettingsT], int],
        weights: int,
        where: str = "memory",
    ) -> None:
        """Refuse settings whose `memory(settings)` bytes exceed those `available`, naming values that would fit.

        Args:
            available: bytes.
            settings: the estimator's; `memory_settings` names those that are varied.
            memory: settings -> bytes needed.
            weights: n, for the message and as the bound of settings that are not set.
            where: the kind of memory, for the message.

        Raises:
            SettingsError: with the largest values that fit.
        """
        needed = memory(settings)
        if needed <= available:
            return
        fitting = []
        for name in cls.memory_settings:
            given = getattr(settings, name)

            def too_large(value: int, name: str = name) -> bool:
                return memory(settings.model_copy(update={name: value})) > available

            largest = bisect_left(range(1, given or weights), True, key=too_large)
            if largest:
                fitting.append(f"estimator.{name}={largest}")
        advice = f"set {' or '.join(fitting)} or less" if fitting else "prune fewer parameters (include, exclude)"
        raise SettingsError(
            f"the estimator '{cls.name}' needs {needed / 2**20:,.1f} MiB of {where} for {weights:,} weights, "
            f"{available / 2**20:,.1f} MiB are available; {advice}"
        )

    def resolve_damping(self, damping: float | None, mean_diagonal: float) -> float:
        """γ as a number in units of the Fisher; `mean_diagonal` is that of F without damping.

        Raises:
            CurvatureError: γ is not a finite number above zero.
        """
        if damping is not None:
            if not 0 < damping < inf:
                raise CurvatureError(f"a damping of {damping} was given; a finite number above zero is needed")
            return damping
        gamma = float(self.settings.damping)
        if self.settings.damping_scale == "relative":
            gamma *= mean_diagonal
        if not gamma > 0:
            raise CurvatureError(
                f"damping {self.settings.damping} relative to a mean Fisher diagonal of {mean_diagonal} is not "
                f"positive: {self.why_zero()}"
            )
        return gamma

    def why_zero(self) -> str:
        """Why the diagonal can be zero, and what to do, for the message."""
        return (
            "no prunable weight changes the loss of an example that is taken alone (dead units, a network that "
            "subtracts the mean of its batch, a loss that is flat); mend that, or set damping_scale='absolute'"
        )
