"""What a plugin may supply: curvature estimators, saliencies, schedules, patterns and tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn

from sparsekit.curvature.vectors import FisherKind
from sparsekit.errors import CurvatureError, SettingsError
from sparsekit.machine import Memory
from sparsekit.methods.plain_values import as_number
from sparsekit.problem.likelihoods import Likelihood
from sparsekit.problem.objective import Batch, Mean, Objective, as_found, pairs
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.removal import Compensation, InverseFisher

#: Raised whenever a change here would break plugins; part of every run's identity.
INTERFACE_VERSION = 1

Split = Literal["train", "tuning", "reporting"]


class Settings(BaseModel):
    """Frozen data; unknown keys are refused, numbers that are not finite, and true or false for a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, given: Any, info: ValidationInfo) -> Any:
        return as_number(cls.model_fields[str(info.field_name)].annotation, given)


class EstimatorSettings(Settings):
    """What every curvature estimator can be told. An estimator adds its own and may change defaults."""

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


class CurvatureEstimator(ABC):
    """Estimates Σ ≈ (F + γI)⁻¹; it never touches weights, masks on the model, schedules, files or loggers."""

    name: ClassVar[str]
    Settings: ClassVar[type[EstimatorSettings]] = EstimatorSettings

    def __init__(self, space: ParameterSpace, settings: Any) -> None:
        self.space = space
        self.settings = settings

    @abstractmethod
    def update(self, objective: Objective, *, generator: torch.Generator) -> Mapping[str, float]:
        """Assimilate the objective's examples at its present weights; return figures worth recording.

        Called again after each cut or fine-tuning: an estimator refines what it knows, or starts afresh where
        its method says so. The objective's model is left as it was found.
        """

    @abstractmethod
    def inverse(self, damping: float | None = None) -> InverseFisher:
        """Σ from the statistics so far; another damping reuses them where the method allows."""

    def shrink(self, mask: Mask) -> None:  # noqa: B027 - following a cut is optional
        """Follow a cut. By default nothing: removal conditions on removed weights exactly."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """All that `update` has left behind, as tensors, so that resume equals uninterrupted.

        A large tensor given again as the same object is written again only where torch has counted a change: change
        it by its own in-place operations, not through `.data` or numpy.
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""

    def state_device(self, name: str, tensor: Tensor, device: torch.device) -> torch.device:
        """Where a tensor of the state lies while the model is on `device`; a resumed run puts it there.

        By default beside the model. A checkpoint holds everything on the host, and only the estimator knows what it
        keeps there: rows that are paged in because the device is too small for them must not all be put on it.
        """
        return device

    @classmethod
    def statistics(cls, settings: Any) -> Mapping[str, Any]:
        """The settings that decide what a first `update` leaves behind: all but the damping.

        Estimators that agree in them, and saw the same examples at the same weights, may share it by `adopt`.
        """
        out: dict[str, Any] = settings.model_dump(mode="json", exclude={"damping", "damping_scale"})
        return out

    def adopt(self, state: Mapping[str, Tensor]) -> bool:
        """Take over what the first `update` of another estimator with the same `statistics` has left behind.

        Afterwards this one is as after its own update. False, and unchanged, where that cannot be had at its damping.
        """
        self.load_state_dict(state)
        return True

    @classmethod
    @abstractmethod
    def memory(cls, space: ParameterSpace, settings: Any) -> int:
        """Bytes of the state and the largest temporary, before anything is allocated."""

    @classmethod
    def describe(cls, space: ParameterSpace, settings: Any) -> Mapping[str, str]:
        """Name of a parameter -> how its curvature is modelled, for the record; empty where nothing differs."""
        return {}

    @classmethod
    def unit(cls, settings: Any) -> Literal["loss", "other", "layer"]:
        """What scores and predicted increases are in, given the settings.

        The network's loss; something else that compares across layers; or each layer's own, which does not.
        """
        return "loss"

    #: Integer settings that memory grows with; a refusal names the values that would fit.
    memory_settings: ClassVar[tuple[str, ...]] = ("batch_size",)

    @classmethod
    def check(cls, model: nn.Module, space: ParameterSpace, settings: Any, available: Memory) -> None:
        """Refuse what cannot work before any gradient is taken.

        Args:
            model: the network, perhaps untrained; its layers count, not its weights.
            space: its prunable weights.
            settings: the estimator's.
            available: bytes that can be allocated.

        Raises:
            SettingsError: with the number that would fit.
        """
        cls.check_memory(available.device, settings, lambda given: cls.memory(space, given), space.size)

    @classmethod
    def check_memory(
        cls, available: int, settings: Any, memory: Callable[[Any], int], weights: int, where: str = "memory"
    ) -> None:
        """Refuse settings whose `memory(settings)` bytes exceed those `available`, naming values that would fit.

        Args:
            available: bytes.
            settings: the estimator's; `memory_settings` names those that are varied.
            memory: settings -> bytes needed.
            weights: how many are prunable, for the message and as the bound of settings that are not set.
            where: what kind of memory it is, for the message.

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
            CurvatureError: it is not finite and above zero.
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
        """What makes the diagonal vanish, and what to do."""
        return (
            "no prunable weight changes the loss of an example that is taken alone (dead units, a network that "
            "subtracts the mean of its batch, a loss that is flat); mend that, or set damping_scale='absolute'"
        )


@dataclass(frozen=True)
class Units:
    """Groups of weights that a pattern decides on together.

    Attributes:
        index: (m, B), coordinates of the groups; no weight is in two of them.
        removed: how many of each group go once the pattern is complete.
    """

    index: Tensor
    removed: int


@dataclass(frozen=True)
class Preset:
    """A published configuration that can be run by name.

    Attributes:
        name: `--preset NAME`.
        reference: the paper or code that states it.
        settings: of a run; whatever else is given wins over them.
        differs: what could not be taken over as published, and why; empty where nothing.
    """

    name: str
    reference: str
    settings: Mapping[str, Any]
    differs: str = ""


class ScoreContext(ABC):
    """What a saliency may ask for; what nobody asks for is never computed."""

    @property
    @abstractmethod
    def weights(self) -> Tensor:
        """w, (n,)."""

    @property
    @abstractmethod
    def mask(self) -> Mask:
        """Before the cut."""

    @property
    @abstractmethod
    def inverse(self) -> InverseFisher:
        """Σ."""

    @property
    @abstractmethod
    def gradient(self) -> Tensor:
        """∇L(w), (n,), on the calibration examples."""

    @property
    def space(self) -> ParameterSpace:
        """The tensors that the weights come from."""
        raise NotImplementedError(f"{type(self).__name__} does not say which tensors its weights come from")

    @property
    @abstractmethod
    def units(self) -> Units | None:
        """The pattern's units, None where weights go one by one."""

    @property
    @abstractmethod
    def generator(self) -> torch.Generator:
        """For saliencies that draw."""


class Saliency(ABC):
    """Scores weights: the lowest are removed first."""

    name: ClassVar[str]
    #: Whether it scores the groups of a pattern, and so needs a pattern that has them.
    of_groups: ClassVar[bool] = False
    #: Whether it asks for the gradient, and so needs examples also where the estimator takes none.
    takes_gradient: ClassVar[bool] = False
    Settings: ClassVar[type[Settings]] = Settings

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @abstractmethod
    def score(self, context: ScoreContext) -> Tensor:
        """(n,) scores; those of removed weights are ignored."""


class Schedule(ABC):
    """How sparsity grows from one level to the next."""

    name: ClassVar[str]
    Settings: ClassVar[type[Settings]] = Settings

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @abstractmethod
    def sparsities(self, start: float, target: float, steps: int) -> Sequence[float]:
        """`steps` sparsities, increasing, the last of them `target`; `start` is not among them."""


class Pattern(ABC):
    """Which sets of weights may be removed together."""

    name: ClassVar[str]
    #: Whether scores of different tensors are compared; where they are not, any scale within a tensor will do.
    across_layers: ClassVar[bool] = True
    Settings: ClassVar[type[Settings]] = Settings

    def __init__(self, settings: Any) -> None:
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


class CompensationSettings(Settings):
    """How the surviving weights move when others go; see `InverseFisher.remove`."""

    how: Literal[Compensation, "exact"] = Field(
        "joint",
        description="joint, independent (as most papers publish it), none, or exact: joint with the Gauss-Newton "
        "matrix of the whole network, which the estimator only preconditions",
    )
    first_order: float = Field(
        0.0,
        ge=0,
        le=1,
        description="weight of the gradient in the quadratic model; 0: a trained network's, zero",
    )
    scale: float = Field(1.0, ge=0, le=1, description="of the survivors' move; 1: the solution, 0: none")
    damping: float | None = Field(
        None,
        gt=0,
        description="γ of an exact solve, in units of the Fisher; by default the estimator's, which for identity and "
        "layer-wise estimators is in other units",
    )
    tolerance: float = Field(1e-2, gt=0, lt=1, description="relative residual at which an exact solve ends")
    max_iterations: int = Field(
        100, ge=1, description="products of an exact solve at most; one that ends so is listed as degraded"
    )


class ReconstructionSettings(Settings):
    """How layers are fitted to what they give in the dense network; see `reconstruction`."""

    how: Literal["none", "layerwise", "fisher"] = Field(
        "none",
        description="after a cut, fit each layer's survivors to its outputs in the dense network: not at all, all "
        "outputs alike, or weighted by their Fisher information",
    )
    examples: int = Field(
        1024,
        ge=1,
        description="training examples that are fitted, labels unused; by default as many as there are, at most 1024",
    )
    batch_size: int = Field(64, ge=1, description="examples in one pass")
    positions: int | None = Field(
        64, ge=1, description="drawn for each example and layer, of those that a weight is applied at; null: all"
    )
    ridge: float = Field(1e-3, ge=0, description="towards the weights as they are, relative to the mean of diag Â")
    norms: bool = Field(
        True,
        description="fit the bias of a batch normalisation that follows a layer without one, as if it were its own",
    )
    sweeps: int = Field(1, ge=1, description="times that all layers are fitted, one after the other")
    when: Literal["cut", "level"] = Field("cut", description="after every cut, or only where a level is reached")
    held_out: float = Field(0.125, ge=0, lt=1, description="fraction of the batches that fits are judged on")
    cache_mebibytes: int = Field(
        1024, ge=0, description="host memory for activations that need not be computed again; 0: none"
    )

    @model_validator(mode="after")
    def _told_how(self) -> Self:
        if self.model_fields_set and "how" not in self.model_fields_set:
            raise ValueError("settings without `how` do nothing; set how=layerwise or fisher")
        return self


class FinetuneSettings(Settings):
    """Masked training with momentum SGD after a cut; the same for every method that is compared."""

    epochs: float = Field(0.0, ge=0, description="passes over the training examples after each step; 0: none")
    learning_rate: float = Field(0.01, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    batch_size: int = Field(128, ge=1)
    decay: Literal["cosine", "constant"] = Field("cosine", description="of the learning rate within one step")
    refine_every: int = Field(
        0,
        ge=0,
        description="optimiser steps after which the estimator is updated at the present weights; 0: only at cuts",
    )


class TaskSettings(Settings):
    """What every task can be told. A task adds its own."""

    data_dir: str | None = Field(None, description="folder of the data set; --data-dir sets it")
    checkpoint: str | None = Field(None, description="file of the dense weights; --checkpoint sets it")
    seed: int = Field(0, description="seed of the dense network's training, where the task trains one")


class Task(ABC):
    """A trained network, its data and how it is measured.

    Construction is cheap and reads nothing but what is needed to say that a file or folder is missing.

    Attributes:
        settings: of the class's `Settings`.
        progress: to be called with (steps done, steps in all) where `model` trains; a run sets it.
        device: where `model` trains; a run sets it.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[TaskSettings]] = TaskSettings
    likelihood: Likelihood
    #: What fine-tuning does unless the run says otherwise.
    finetune: ClassVar[FinetuneSettings] = FinetuneSettings()
    #: The run's default sparsities.
    sparsity: ClassVar[tuple[float, ...]] = (0.9,)

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.progress: Callable[[int, int], None] = lambda done, total: None
        self.device = torch.device("cpu")

    @abstractmethod
    def network(self) -> nn.Module:
        """The architecture with untrained weights; reads no data. `--dry-run` needs no more."""

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
            limit: at most so many examples.
            generator: a CPU generator; with it the order is random (drawn anew at each iteration), and with
                `limit` a random subset. Without it, stored order.
            augment: whether the task's training augmentation is applied; needs the generator.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the data that the task reads, part of a run's identity."""

    def measure(self, model: nn.Module, split: Split) -> dict[str, float]:
        """The mean loss, and top-1 accuracy as a fraction where the likelihood has one."""
        return measure(model, self.likelihood, self.batches(split, batch_size=100))


def measure(model: nn.Module, likelihood: Likelihood, batches: Iterable[Batch]) -> dict[str, float]:
    """The mean loss over the examples, and accuracy in [0, 1] where the likelihood has one.

    Both over the positions that count, whatever the batches.

    Raises:
        DataError, ModelError: a batch is no pair of tensors, or the model's output is none.
    """
    device = next(model.parameters()).device
    loss, right, has_accuracy = Mean(), Mean(), True
    with as_found(model), torch.no_grad():
        for inputs, targets in pairs(batches, device):
            output = model(inputs)
            loss.add(likelihood.losses(output, targets), likelihood.divisor(targets))
            accuracy = likelihood.accuracy(output, targets)
            has_accuracy = accuracy is not None
            if accuracy is not None:
                right.add(accuracy, likelihood.counted(targets))
    return {"loss": loss.value} | ({"accuracy": right.value} if has_accuracy else {})
