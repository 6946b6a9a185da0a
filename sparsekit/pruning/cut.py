"""One cut: score, choose, remove. The caller writes the result to the model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from sparsekit.curvature import GaussNewton, fisher_diagonal
from sparsekit.curvature.vectors import FisherKind
from sparsekit.errors import CurvatureError, SettingsError
from sparsekit.linalg import MatrixFree
from sparsekit.methods.contracts import scores_of
from sparsekit.methods.interfaces import CompensationSettings, Pattern, Saliency, ScoreContext, Trial, Units
from sparsekit.problem.networks import as_found, outputs
from sparsekit.problem.objective import Batch, Objective
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.removal import InverseFisher, Removal


@dataclass
class Surgeon:
    """How a cut is made.

    Attributes:
        saliency: scores the weights.
        pattern: chooses among them.
        compensation: how the kept weights move.
        remembers: keep scores for cuts that begin where this one did.
    """

    saliency: Saliency
    pattern: Pattern
    compensation: CompensationSettings
    remembers: bool = False
    _scores: Tensor | None = field(default=None, init=False)

    def remove(
        self,
        weights: Tensor,
        mask: Mask,
        sparsity: float,
        inverse: InverseFisher,
        objective: Objective,
        generator: torch.Generator,
        *,
        as_before: bool = False,
    ) -> tuple[Removal, Mask, float | None]:
        """The removal that reaches a sparsity, the mask after it, and the change of the loss that the saliency expects.

        Args:
            weights: (n,).
            mask: before the cut.
            sparsity: after it, as a fraction of the prunable weights.
            inverse: Σ.
            objective: on the calibration examples, at these weights.
            generator: for saliencies that draw random numbers.
            as_before: whether weights, mask, Σ and examples are those of the last remembered scores.

        Raises:
            CurvatureError: scores are not finite.
        """
        space, how = objective.space, self.compensation
        context = _Context(weights, mask, inverse, objective, self.pattern.units(space), generator)
        scores = self._scores if as_before and self._scores is not None else self._scored(context, objective)
        chosen = self.pattern.choose(scores, mask, self.pattern.count(space, sparsity), space)
        gradient = how.first_order * context.gradient if how.first_order else None
        if how.how == "exact":
            removal = self._exact(inverse, objective).remove(weights, mask, chosen, "joint", gradient, how.scale)
        else:
            removal = inverse.remove(weights, mask, chosen, how.how, gradient, how.scale)
        return removal, mask.without(chosen), self.saliency.predicted(context, removal.delta)

    def _scored(self, context: ScoreContext, objective: Objective) -> Tensor:
        before = context.generator.get_state()
        scores = scores_of(self.saliency, context)
        if not bool(scores[context.mask.kept].isfinite().all()):
            raise CurvatureError(f"the saliency '{self.saliency.name}' gave scores that are not finite")
        scores = self.pattern.rescore(scores, context.mask, context.space, self._trial(context, objective))
        drew = not torch.equal(before, context.generator.get_state())
        self._scores = scores if self.remembers and not drew else None
        return scores

    def _trial(self, context: ScoreContext, objective: Objective) -> Trial:
        """Trials on the model of the objective, which has the context's weights before and after each."""
        how = "joint" if self.compensation.how == "exact" else self.compensation.how  # the estimator's own Σ
        before: dict[int, tuple[Objective, float]] = {}
        space, weights = context.space, context.weights

        def trial(chosen: Tensor, examples: int) -> float:
            if examples not in before:
                some = _own_predictions(_beginning(objective, examples))
                before[examples] = some, some.loss()
            some, least = before[examples]
            delta = context.inverse.remove(weights, context.mask, chosen, how, None, self.compensation.scale).delta
            space.write(objective.model, (weights + delta).masked_fill(chosen, 0.0))
            try:
                return some.loss() - least
            finally:
                space.write(objective.model, weights)

        return trial

    def _exact(self, inverse: InverseFisher, objective: Objective) -> InverseFisher:
        """Σ of the calibration examples' Gauss-Newton matrix; the estimator's Σ is the preconditioner."""
        fisher, gamma = GaussNewton(objective), self.compensation.damping or inverse.damping
        operator = MatrixFree(
            lambda v: (fisher @ v.to(objective.dtype)).to(v.dtype) + gamma * v,
            inverse.operator,
            tolerance=self.compensation.tolerance,
            max_iterations=self.compensation.max_iterations,
        )
        return InverseFisher(operator, gamma)


def _beginning(objective: Objective, examples: int) -> Objective:
    """The objective on its first batches, as many as have that many examples."""
    taken: list[Batch] = []
    for batch in objective.batches:
        if sum(len(inputs) for inputs, _ in taken) >= examples:
            break
        taken.append(batch)
    return replace(objective, batches=taken, share=objective.mean_share)


@torch.no_grad()
def _own_predictions(objective: Objective) -> Objective:
    """The objective with the model's own predictions as targets, of which the loss is least at the present weights.

    By the data's targets a small cut changes the loss by its gradient on these few examples: noise, of either sign.
    Where the likelihood knows no such targets, or weighs positions, the data's are kept.
    """
    batches = []
    with as_found(objective.model):
        for inputs, targets in objective.on_device():
            output = outputs(objective.model, inputs)
            expected = objective.likelihood.expected(output)
            if expected is None or objective.likelihood.weights(output, targets) is not None:
                return objective
            batches.append((inputs, expected))
    return replace(objective, batches=batches, share=None)


class _Context(ScoreContext):
    def __init__(
        self,
        weights: Tensor,
        mask: Mask,
        inverse: InverseFisher,
        objective: Objective,
        units: Units | None,
        generator: torch.Generator,
    ) -> None:
        self._weights, self._mask, self._inverse = weights, mask, inverse
        self._objective, self._units, self._generator = objective, units, generator
        self._diagonals: dict[FisherKind, Tensor] = {}

    @property
    def weights(self) -> Tensor:
        return self._weights

    @property
    def mask(self) -> Mask:
        return self._mask

    @property
    def inverse(self) -> InverseFisher:
        return self._inverse

    @cached_property
    def gradient(self) -> Tensor:
        if not self._objective.batches:
            raise SettingsError("the saliency needs the gradient, and there are no examples; set estimator.examples")
        return self._objective.gradient()

    def diagonal(self, fisher: FisherKind) -> Tensor:
        if fisher not in self._diagonals:
            if not self._objective.batches:
                raise SettingsError("the saliency needs curvature, and there are no examples; set estimator.examples")
            self._diagonals[fisher] = fisher_diagonal(self._objective, fisher, generator=self._generator)
        return self._diagonals[fisher]

    @property
    def space(self) -> ParameterSpace:
        return self._objective.space

    @property
    def units(self) -> Units | None:
        return self._units

    @property
    def generator(self) -> torch.Generator:
        return self._generator
