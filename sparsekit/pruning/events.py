"""The events of the pruning loop, and its state between steps, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sparsekit.methods.schedules import Step
from sparsekit.problem.parameters import Mask
from sparsekit.reconstruction.fit import LayerFit

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class DenseMeasured:
    """The dense network has been measured, before the first step.

    Attributes:
        metrics: of the dense network.
        seconds: that the measurement took.
    """

    metrics: Metrics
    seconds: float


@dataclass(frozen=True)
class PhaseStarted:
    """A phase of a step begins: 'curvature', 'removal', 'reconstruction', 'finetune' or 'measure'."""

    phase: str
    step: Step


@dataclass(frozen=True)
class LayerReconstructed:
    """A layer was fitted; a checkpoint can be made of the model and the pruner's state."""

    step: Step
    fit: LayerFit


@dataclass(frozen=True)
class Cut:
    """The results of a step after its weights are removed: plain data.

    Attributes:
        damping: γ of the inverse used.
        curvature: figures of the estimator, empty without a refresh.
        loss: the mean over the calibration examples before the cut.
        predicted_increase, measured_increase: of that loss, by this cut and its compensation, before any
            reconstruction, which the quadratic model does not cover.
        iterations, residual: of the joint solve.
        fell_back: whether joint compensation was worse than none, which was applied instead.
        seconds: by phase.
        collapsed: a sentence for each tensor whose last weights this cut removed, and one where more than half of the
            output no longer depends on the input.
    """

    damping: float
    curvature: Metrics
    loss: float
    predicted_increase: float
    measured_increase: float
    iterations: int
    residual: float
    fell_back: bool
    seconds: Metrics
    collapsed: Sequence[str] = field(default=(), kw_only=True)


@dataclass(frozen=True)
class Reconstructed:
    """The results of the reconstruction after a cut.

    Attributes:
        increase: of the loss over the calibration examples, by reconstruction; mostly negative.
        layers: in the order in which they were fitted.
        left: name of a weight -> why it was not fitted.
    """

    increase: float
    layers: Sequence[LayerFit]
    left: Mapping[str, str]


@dataclass(frozen=True)
class StepCompleted(Cut):
    """A step is finished; a checkpoint should be made of the model and the mask.

    Attributes:
        step: the plan's step.
        removed: number of weights removed in all.
        reconstruction: its results; None without one.
        batch_norm_increase: of the loss over the calibration examples, by new batch norm statistics; None without any.
        pruned, finetuned: metrics after each phase, where measured.
        layer_sparsity: parameter name -> sparsity.
    """

    step: Step
    removed: int
    reconstruction: Reconstructed | None
    batch_norm_increase: float | None
    pruned: Metrics | None
    finetuned: Metrics | None
    layer_sparsity: Metrics

    @property
    def index(self) -> int:
        """The index of the step, from 0 over the whole run."""
        return self.step.index

    @property
    def sparsity(self) -> float:
        """The sparsity after the step, as a fraction of the prunable weights."""
        return self.step.sparsity

    @property
    def refreshed(self) -> bool:
        """Whether the curvature was estimated anew for this step."""
        return self.step.refresh


Event = DenseMeasured | PhaseStarted | LayerReconstructed | StepCompleted


@dataclass
class PrunerState:
    """The pruner's state between steps, for checkpoints. The model's own state is stored beside it.

    Attributes:
        next_step: index of the step to do next, or to continue.
        mask: None before the first step.
        dense: metrics of the dense network.
        cut: of that step, after its weights are removed.
        fits: of its layers that are already reconstructed.
    """

    next_step: int = 0
    mask: Mask | None = None
    dense: Metrics | None = None
    cut: Cut | None = None
    fits: tuple[LayerFit, ...] = ()
