"""What the pruning loop tells, and what it needs to go on: plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sparsekit.methods.schedules import Step
from sparsekit.problem.parameters import Mask
from sparsekit.reconstruction.fit import LayerFit

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class DenseMeasured:
    """The dense network, before anything is done to it.

    Attributes:
        metrics: its own.
        seconds: the measurement took.
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
    """A layer was fitted; the model and the pruner's state are what a checkpoint may hold."""

    step: Step
    fit: LayerFit


@dataclass(frozen=True)
class Cut:
    """What is known of a step once its weights are removed: plain data.

    Attributes:
        damping: γ of the inverse used.
        curvature: figures of the estimator, empty without a refresh.
        loss: the mean over the calibration examples before the cut.
        predicted_increase, measured_increase: of that loss, by this cut, before any reconstruction: the quadratic
            model speaks of the cut and its compensation.
        iterations, residual: of the joint solve.
        fell_back: whether joint compensation came out worse than none, which was applied instead.
        seconds: by phase.
        collapsed: a sentence for each tensor whose last weights this cut took, and one where the output depends no
            longer on the input, or more than half of it.
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
    """What came of the layers after a cut.

    Attributes:
        increase: of the loss over the calibration examples, by reconstruction; mostly negative.
        layers: in the order in which they were fitted.
        left: name of a weight -> why it is as the cut left it.
    """

    increase: float
    layers: Sequence[LayerFit]
    left: Mapping[str, str]


@dataclass(frozen=True)
class StepCompleted(Cut):
    """A step is over; the model and the mask are what a checkpoint should hold.

    Attributes:
        step: the plan's step.
        removed: weights removed in all.
        reconstruction: what it did; None without.
        pruned, finetuned: metrics after each phase, where measured.
        layer_sparsity: by parameter.
    """

    step: Step
    removed: int
    reconstruction: Reconstructed | None
    pruned: Metrics | None
    finetuned: Metrics | None
    layer_sparsity: Metrics

    @property
    def index(self) -> int:
        """Of the step, from 0 over the whole run."""
        return self.step.index

    @property
    def sparsity(self) -> float:
        """After the step, as a fraction of the prunable weights."""
        return self.step.sparsity

    @property
    def refreshed(self) -> bool:
        """Whether the curvature was estimated anew for this step."""
        return self.step.refresh


Event = DenseMeasured | PhaseStarted | LayerReconstructed | StepCompleted


@dataclass
class PrunerState:
    """What the next step needs, and a checkpoint holds. The model's own state travels beside it.

    Attributes:
        next_step: index of the step that is to be done, or goes on.
        mask: None before the first.
        dense: metrics.
        cut: of that step, once its weights are removed.
        fits: of its layers that are reconstructed already.
    """

    next_step: int = 0
    mask: Mask | None = None
    dense: Metrics | None = None
    cut: Cut | None = None
    fits: tuple[LayerFit, ...] = ()
