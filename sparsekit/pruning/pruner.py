"""The pruning loop: refresh, score, choose, remove, fine-tune. A generator of events; no files, no MLflow."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.methods.contracts import inverse_of
from sparsekit.methods.interfaces import (
    BatchNormSettings,
    CompensationSettings,
    CurvatureEstimator,
    FinetuneSettings,
    Pattern,
    ReconstructionSettings,
    Saliency,
)
from sparsekit.methods.schedules import Step
from sparsekit.problem.likelihoods import Likelihood
from sparsekit.problem.objective import Batch, Objective
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.pruning.clock import Clock
from sparsekit.pruning.collapse import constant_outputs, emptied, silenced
from sparsekit.pruning.cut import Surgeon
from sparsekit.pruning.events import (
    Cut,
    DenseMeasured,
    Event,
    LayerReconstructed,
    Metrics,
    PhaseStarted,
    PrunerState,
    Reconstructed,
    StepCompleted,
)
from sparsekit.pruning.finetune import finetune
from sparsekit.pruning.rebuilding import Rebuilding
from sparsekit.pruning.seeds import generator_for, seeded
from sparsekit.removal import InverseFisher, Removal


def _update(
    step: Step, estimator: CurvatureEstimator, objective: Objective, generator: torch.Generator
) -> Mapping[str, float]:
    return estimator.update(objective, generator=generator)


def _from_dense_again(step: Step) -> bool:
    """Whether a step begins at the dense weights with the curvature of the level before."""
    return step.restart and not step.refresh


def _loss(objective: Objective) -> float:
    """The mean loss; NaN without examples."""
    return objective.loss() if objective.batches else math.nan


@dataclass
class Pruner:
    """Prunes a model in place along a plan.

    Attributes:
        model: pruned in place.
        space: its prunable weights.
        likelihood: the loss.
        estimator: kept across steps.
        saliency, pattern, compensation: how a cut is made.
        steps: the plan.
        calibration: generator -> batches for one curvature estimate.
        seed: of all random draws; draws of one step do not depend on those of another.
        measure: model -> metrics.
        reconstruction, anchors: how layers are fitted after a cut; generator -> the batches that they are fitted on.
        batch_norm, norm_examples: whether batch norm statistics are taken anew after a cut; generator -> their batches.
        finetune_settings, training, training_batches: the recipe; generator -> an epoch's batches; their number.
        update: (step, estimator, objective, generator) -> figures; updates the estimator on a step's examples.
        progress: called with (phase, done, total) during long work.
    """

    model: nn.Module
    space: ParameterSpace
    likelihood: Likelihood
    estimator: CurvatureEstimator
    saliency: Saliency
    pattern: Pattern
    compensation: CompensationSettings
    steps: Sequence[Step]
    calibration: Callable[[torch.Generator], Sequence[Batch]]
    measure: Callable[[nn.Module], Metrics]
    seed: int = 0
    reconstruction: ReconstructionSettings = field(default_factory=ReconstructionSettings)
    anchors: Callable[[torch.Generator], Sequence[Batch]] | None = None
    batch_norm: BatchNormSettings = field(default_factory=BatchNormSettings)
    norm_examples: Callable[[torch.Generator], Sequence[Batch]] | None = None
    finetune_settings: FinetuneSettings = field(default_factory=FinetuneSettings)
    training: Callable[[torch.Generator], Iterable[Batch]] | None = None
    training_batches: int = 0
    update: Callable[[Step, CurvatureEstimator, Objective, torch.Generator], Metrics] = _update
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None
    state: PrunerState = field(default_factory=PrunerState)

    def __post_init__(self) -> None:
        # The weights that a restart loads. A pruner is always made with the dense model, also in a resumed run.
        restarts = any(step.restart for step in self.steps)
        self._dense_weights = {name: t.clone() for name, t in self.model.state_dict().items()} if restarts else {}
        self._rebuilding = Rebuilding(
            self.model,
            self.space,
            self.likelihood,
            self.reconstruction,
            self.batch_norm,
            calibration=self.calibration,
            anchors=self.anchors,
            norm_examples=self.norm_examples,
            seed=self.seed,
            progress=lambda done, total: self.progress("reconstruction", done, total),
        )
        again = any(_from_dense_again(step) for step in self.steps)
        self._surgeon = Surgeon(self.saliency, self.pattern, self.compensation, remembers=again)
        self._phase = "curvature"
        self._untaught = deepcopy(self.estimator) if restarts else self.estimator

    def restore(self, weights: Mapping[str, Tensor], estimator: Mapping[str, Tensor], state: PrunerState) -> None:
        """Load a checkpoint: the model's and the estimator's state after `state.next_step` steps."""
        self.model.load_state_dict(dict(weights))
        self.estimator.load_state_dict(estimator)
        self.state = state

    def run(self) -> Iterator[Event]:
        """Do the steps from `state.next_step` on; after each, `state` and the model are consistent."""
        device = next(self.model.parameters()).device
        state = self.state
        if state.mask is None:
            state.mask = Mask.full(self.space.size, device)
        if state.dense is None:
            clock = Clock(device)
            state.dense = self.measure(self.model)
            clock.lap("measure")
            yield DenseMeasured(state.dense, clock.seconds["measure"])
        for step in self.steps[state.next_step :]:
            yield from self._step(step, device)

    def _step(self, step: Step, device: torch.device) -> Iterator[Event]:
        state = self.state
        assert state.mask is not None
        clock = Clock(device)
        self._refined: Metrics = {}  # figures of the last update while fine-tuning
        if step.restart and state.cut is None:
            self.model.load_state_dict(self._dense_weights)
            state.mask = Mask.full(self.space.size, device)
            if step.refresh:  # forget the statistics from other levels' weights
                self.estimator = deepcopy(self._untaught)
            self.estimator.shrink(state.mask)
        calibration = self.calibration(self._generator("calibration", self._refresh_index(step)))
        watched = _Watched(calibration, lambda done: self.progress(self._phase, done, len(calibration)))
        objective = Objective(self.model, self.likelihood, watched, self.space)
        if state.cut is None:
            yield from self._remove(step, objective, clock)
        assert state.cut is not None

        reconstructed = None
        loss = state.cut.loss + state.cut.measured_increase
        if self._rebuilding.fits(step.completes_level):
            yield self._started("reconstruction", step)
            left = yield from self._reconstruct(step, clock)
            before, loss = loss, _loss(objective)
            reconstructed = Reconstructed(loss - before, state.fits, left)
        renewed = None
        if self._rebuilding.renew_norms(step.index):
            renewed = _loss(objective) - loss
        clock.lap("reconstruction")

        yield self._started("measure", step)
        pruned = self.measure(self.model) if step.completes_level or step.finetune else None
        clock.lap("measure")
        finetuned = None
        if step.finetune and self.training is not None:
            yield self._started("finetune", step)
            self._finetune(step, clock)
            clock.lap("finetune")
            finetuned = self.measure(self.model)
            clock.lap("measure")
        cut = state.cut
        seconds = {
            phase: cut.seconds.get(phase, 0) + clock.seconds.get(phase, 0) for phase in {**cut.seconds, **clock.seconds}
        }
        state.next_step, state.cut, state.fits = step.index + 1, None, ()
        known = vars(cut) | {"curvature": {**cut.curvature, **self._refined}, "seconds": seconds}
        yield StepCompleted(
            step=step,
            removed=state.mask.removed_count,
            reconstruction=reconstructed,
            batch_norm_increase=renewed,
            pruned=pruned,
            finetuned=finetuned,
            layer_sparsity={info.name: Mask(state.mask.kept[info.slice]).sparsity for info in self.space.parameters},
            **known,
        )

    def _remove(self, step: Step, objective: Objective, clock: Clock) -> Iterator[Event]:
        """Do the curvature and the cut; the results are in `state.cut`."""
        yield self._started("curvature", step)
        curvature: Metrics = {}
        if step.refresh:
            generator = self._generator("labels", step.index)
            curvature = self.update(step, self.estimator, objective, generator)
        inverse = inverse_of(self.estimator)
        clock.lap("curvature")

        yield self._started("removal", step)
        calibration: Sequence[Batch] = objective.batches  # type: ignore[assignment]
        before = _loss(objective)
        mask, constant = self.state.mask, constant_outputs(self.model, calibration)
        assert mask is not None
        removal, expected = self._cut(step, inverse, objective)
        assert self.state.mask is not None
        clock.lap("removal")
        after = _loss(objective)
        now_constant = constant_outputs(self.model, calibration)
        clock.lap("measure")
        self.state.cut = Cut(
            damping=inverse.damping,
            curvature=curvature,
            loss=before,
            predicted_increase=self._predicted(removal, expected),
            measured_increase=after - before,
            iterations=removal.iterations,
            residual=removal.residual,
            fell_back=removal.fell_back,
            collapsed=(*emptied(self.space, mask, self.state.mask), *silenced(constant, now_constant)),
            seconds=dict(clock.seconds),
        )
        clock.seconds.clear()

    def _reconstruct(self, step: Step, clock: Clock) -> Generator[Event, None, Mapping[str, str]]:
        """Fit the remaining layers; returns name -> reason for those that cannot be fitted."""
        state = self.state
        assert state.mask is not None
        clock.seconds["reconstruction"] = sum(fit.seconds for fit in state.fits)  # from before an interruption
        work = self._rebuilding.fit(step.index, state.mask, self.estimator, len(state.fits))
        while True:
            try:
                fit = next(work)
            except StopIteration as end:
                left: Mapping[str, str] = end.value
                return {**left} | {fit.name: fit.left for fit in state.fits if fit.left}
            state.fits = (*state.fits, fit)
            clock.lap("reconstruction")
            yield LayerReconstructed(step, fit)

    def _predicted(self, removal: Removal, expected: float | None) -> float:
        """By the saliency's model of the loss, else the estimator's; other units than the loss's predict nothing."""
        if expected is not None and self.compensation.how != "exact":
            return expected
        return removal.increase if self._is_of_the_loss else math.nan

    def _cut(self, step: Step, inverse: InverseFisher, objective: Objective) -> tuple[Removal, float | None]:
        """Score, choose and remove; updates the model, the mask and the estimator."""
        assert self.state.mask is not None
        weights = self.space.read(self.model)
        generator = self._generator("saliency", step.index)
        removal, mask, expected = self._surgeon.remove(
            weights, self.state.mask, step.sparsity, inverse, objective, generator, as_before=_from_dense_again(step)
        )
        self.state.mask = mask
        self.space.write(self.model, weights + removal.delta)
        mask.apply(self.space, self.model)
        self.estimator.shrink(mask)
        return removal, expected

    @property
    def _is_of_the_loss(self) -> bool:
        return self.estimator.unit(self.estimator.settings) == "loss" or self.compensation.how == "exact"

    def _started(self, phase: str, step: Step) -> PhaseStarted:
        self._phase = phase
        return PhaseStarted(phase, step)

    def _finetune(self, step: Step, clock: Clock) -> None:
        training, mask, every = self.training, self.state.mask, self.finetune_settings.refine_every
        assert training is not None and mask is not None
        generator = self._generator("finetune", step.index)
        # only where a later cut uses it
        refines = bool(every) and any(s.index == step.index + 1 and not s.restart for s in self.steps)

        def after_each(done: int, total: int) -> None:
            self.progress("finetune", done, total)
            if refines and done % every == 0 and done < total:
                clock.lap("finetune")
                calibration = self.calibration(self._generator(f"refine/{done}", step.index))
                objective = Objective(self.model, self.likelihood, calibration, self.space)
                labels = self._generator(f"refine labels/{done}", step.index)
                figures = self.estimator.update(objective, generator=labels)
                self._refined = {f"refined/{name}": value for name, value in figures.items()}
                clock.lap("curvature")

        with seeded(self._generator("dropout", step.index).initial_seed(), mask.kept.device):
            finetune(
                self.model,
                self.likelihood,
                lambda: training(generator),
                self.space,
                mask,
                self.finetune_settings,
                batches_per_epoch=self.training_batches,
                progress=after_each,
            )

    def _refresh_index(self, step: Step) -> int:
        """The step whose calibration examples are used: the last one with a refresh."""
        return max((s.index for s in self.steps[: step.index + 1] if s.refresh), default=0)

    def _generator(self, purpose: str, index: int) -> torch.Generator:
        return generator_for(self.seed, purpose, index)


class _Watched(Sequence[Batch]):
    """A sequence whose iterations report their progress."""

    def __init__(self, batches: Sequence[Batch], tell: Callable[[int], None]) -> None:
        self._batches, self._tell = batches, tell

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        part = self._batches[index]
        return _Watched(part, self._tell) if isinstance(index, slice) else part

    def __iter__(self) -> Iterator[Batch]:
        for done, batch in enumerate(self._batches):
            self._tell(done)
            yield batch
