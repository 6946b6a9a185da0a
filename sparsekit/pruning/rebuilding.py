"""After a cut: layers are fitted to the dense network, and batch normalisation statistics are taken anew."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsekit.errors import SettingsError
from sparsekit.methods.contracts import inverse_of
from sparsekit.methods.interfaces import BatchNormSettings, CurvatureEstimator, ReconstructionSettings
from sparsekit.problem.likelihoods import Likelihood
from sparsekit.problem.networks import copied
from sparsekit.problem.objective import Batch, Objective
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.pruning.batch_norm import recalibrate
from sparsekit.pruning.seeds import generator_for
from sparsekit.reconstruction.fit import LayerFit, Reconstruction, output_moments

#: generator -> batches of training examples.
Examples = Callable[[torch.Generator], Sequence[Batch]]


class Rebuilding:
    """What follows the cuts of one model.

    Args:
        model: dense now; later pruned, and changed in place.
        space: its prunable weights.
        likelihood: the loss.
        reconstruction: how layers are fitted.
        batch_norm: whether statistics are taken anew.
        calibration: the examples of the outputs' Fisher information, where the estimator does not give that.
        anchors: the examples that layers are fitted on; needed with a reconstruction.
        norm_examples: those of new batch norm statistics; needed for these.
        seed: of all draws.
        progress: called with (layers done, layers in all).
    """

    def __init__(
        self,
        model: nn.Module,
        space: ParameterSpace,
        likelihood: Likelihood,
        reconstruction: ReconstructionSettings,
        batch_norm: BatchNormSettings,
        *,
        calibration: Examples,
        anchors: Examples | None,
        norm_examples: Examples | None,
        seed: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self._model, self._space, self._likelihood = model, space, likelihood
        self._reconstruction, self._anew = reconstruction, batch_norm.statistics == "anew"
        self._calibration, self._anchors, self._norm_examples = calibration, anchors, norm_examples
        self._seed, self._progress = seed, progress
        # The network whose outputs layers are fitted to. A resumed run is dense here too, its weights follow later.
        self._dense = copied(model).cpu() if reconstruction.how != "none" else None
        self._weighting: Mapping[str, Tensor] = {}

    def fits(self, completes_level: bool) -> bool:
        """Whether layers are fitted after a cut."""
        return self._dense is not None and (self._reconstruction.when == "cut" or completes_level)

    def fit(
        self, index: int, mask: Mask, estimator: CurvatureEstimator, done: int
    ) -> Generator[LayerFit, None, Mapping[str, str]]:
        """Fit layer after layer.

        Args:
            index: of the step.
            mask: removed weights stay zero.
            estimator: gives the outputs' weighting where it has factors for it.
            done: number of layers that an interrupted run has fitted.

        Returns:
            Name of a weight -> why it was not fitted.
        """
        if self._anchors is None or self._dense is None:
            raise SettingsError("reconstruction needs examples: give the pruner `anchors`")
        dense = self._dense.to(mask.kept.device)
        generator = generator_for(self._seed, "reconstruction", index)
        work = Reconstruction(
            self._model,
            dense,
            self._space,
            mask,
            self._anchors(generator),
            self._reconstruction,
            weighting=self._output_weighting(dense, estimator) if self._reconstruction.how == "fisher" else None,
            statistics_anew=self._anew,
            seed=generator.initial_seed(),
        )
        yield from work.run(done, self._progress)
        self._dense.cpu()  # frees the device's memory
        return work.left

    def renew_norms(self, index: int) -> bool:
        """Take batch norm statistics anew where the settings ask for it; whether there were any."""
        if not self._anew:
            return False
        if self._norm_examples is None:
            raise SettingsError("new batch norm statistics need examples: give the pruner `norm_examples`")
        return recalibrate(self._model, self._norm_examples(generator_for(self._seed, "batch norm", index)))

    def _output_weighting(self, dense: nn.Module, estimator: CurvatureEstimator) -> Mapping[str, Tensor]:
        """The Fisher information of each layer's outputs: from the estimator's factors, else computed once."""
        found = inverse_of(estimator).output_factors(self._space)
        if len(found) == len(self._space):
            return found
        if not self._weighting:  # from the dense network, so that it is the same before and after an interruption
            examples = self._calibration(generator_for(self._seed, "outputs", 0))
            objective = Objective(dense, self._likelihood, examples, self._space)
            generator = generator_for(self._seed, "output labels", 0)
            self._weighting = output_moments(objective, estimator.settings.fisher, generator)
        return {**self._weighting, **found}
