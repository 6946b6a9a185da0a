"""Sentences on degraded steps."""

from __future__ import annotations

from sparsekit.errors import SparsekitError
from sparsekit.methods.interfaces import CompensationSettings
from sparsekit.pruning.events import StepCompleted


def not_reconstructed(error: SparsekitError) -> str:
    """The sentence on a default reconstruction that cannot be done."""
    return f"layers were not fitted to the dense network, which is this estimator's default: {error}"


def degradations(event: StepCompleted, how: CompensationSettings) -> list[str]:
    """One sentence, with advice, for each way in which a step was degraded."""
    found, step = [], f"step {event.step.index}"
    if how.how == "exact" and event.residual > how.tolerance:
        found.append(
            f"{step}: exact compensation stopped after {event.iterations} products, at the relative "
            f"residual {event.residual:.1e} ({how.tolerance:.0e} was asked for)"
        )
    if event.fell_back:
        found.append(
            f"{step}: {how.how} compensation came out worse than none, so the survivors stayed where they were; raise "
            f"the damping{' or compensation.max_iterations' if how.how == 'exact' else ''}"
        )
    if 0 <= event.loss < -event.predicted_increase:  # for losses that are never negative; False where either is NaN
        found.append(
            f"{step}: the predicted change of the loss, {event.predicted_increase:.2g}, would take it below zero from "
            f"{event.loss:.2g}, so the quadratic model does not hold there and the gradient's step may ruin the "
            "network; use a larger estimator.damping, or compensation.first_order < 1 (and the saliency's)"
        )
    return [*found, *(f"{step}: {line}" for line in event.collapsed)]
