"""The FishLeg estimator: Q ≈ (F + γI)⁻¹ layer by layer, started in closed form, refined by auxiliary steps."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparsekit import (
    CurvatureError,
    CurvatureEstimator,
    DataError,
    EstimatorSettings,
    InverseFisher,
    Memory,
    Objective,
    ParameterSpace,
    SettingsError,
)
from sparsekit.curvature import LayerGradients, SharedSum, layer_gradients
from sparsekit.linalg import DirectSum
from sparsekit_fishleg.auxiliary import Fit, fit
from sparsekit_fishleg.blocks import Totals
from sparsekit_fishleg.diagnostics import diagnose
from sparsekit_fishleg.memory import blocks_of, peak_bytes
from sparsekit_fishleg.products import FisherProduct, layer_product, network_product
from sparsekit_fishleg.settings import FishLegSettings
from sparsekit_fishleg.shares import REMEDY, division, halves, shares


class FishLeg(CurvatureEstimator[FishLegSettings]):
    """The inverse Fisher, learned: Q(λ) minimises the Legendre-Fenchel objective A(λ), and is kept across cuts.

    Reference: Garcia, Freddi, Fotiadis, Li, Vakili, Bernacchia and Hennequin, 2023 (Fisher-Legendre optimisation);
    McGowan et al., 2024 (FishLeg surgeon).
    """

    name: ClassVar[str] = "fishleg"
    Settings: ClassVar[type[EstimatorSettings]] = FishLegSettings
    memory_settings: ClassVar[tuple[str, ...]] = ("batch_size", "probes", "max_factor")
    run_defaults: ClassVar[Mapping[str, object]] = {
        "saliency": "obs-rows",
        "compensation": "joint",
        "reconstruction": "fisher",
        "batch_norm": "anew",
    }

    def __init__(self, space: ParameterSpace, settings: FishLegSettings) -> None:
        super().__init__(space, settings)
        self._blocks = blocks_of(space, settings)
        self._fitted: float | None = None  # the damping that Q was fitted at
        self._mean_diagonal = 0.0

    def update(self, objective: Objective, *, generator: torch.Generator) -> Mapping[str, float]:
        """Assimilate the examples: closed-form moments (unless told otherwise), then auxiliary steps.

        Returns:
            `mean_diagonal`, of F without damping; with auxiliary steps their number and that of back-offs, and the
            held-out residual (see `auxiliary.fit`) before and after. With `diagnostics` for each tensor, against the
            held-out examples' layer-block Fisher at the end: `{name}/residual`, ‖r‖²_Q / ‖u‖²_Q;
            `{name}/auxiliary_loss`, (½ (Qu)ᵀH(Qu) − uᵀQu) / ½ uᵀQu, −1 at Q = H⁻¹; `{name}/diagonal_correlation`, that
            of log diag Q⁻¹ with log diag H; `{name}/diagonal_ratio`, the exponential of their mean difference.

        Raises:
            DataError: too few batches for what they are divided into.
            CurvatureError: a gradient or a product is not finite, or the auxiliary fit diverges.
        """
        settings, share = self.settings, shares(objective, self.settings)
        like = torch.empty(0, dtype=objective.dtype, device=objective.device)
        if self._fitted is None or settings.refresh == "moments":
            start = self._measure_trace if settings.start == "identity" else self._assimilate
            start(share.closed_form, generator, like)
        figures = {"mean_diagonal": self._mean_diagonal}
        if settings.auxiliary_steps:
            done = self._refine(share.steps, share.held, generator, like)
            figures |= {
                "auxiliary_steps": float(done.steps),
                "auxiliary_back_offs": float(done.back_offs),
                "residual_before": done.before,
                "residual_after": done.after,
            }
        if settings.diagnostics:
            figures |= self._diagnose(share.held, generator)
        return figures

    def _diagnose(self, held: Objective, generator: torch.Generator) -> dict[str, float]:
        inverse, shape = self.inverse(), (self.space.size, self.settings.probes)
        u = torch.randn(shape, generator=generator, device=generator.device).to(held.device, held.dtype)
        return diagnose(inverse.operator, inverse.damping, held, self.settings.fisher, u, generator)

    def _assimilate(self, objective: Objective, generator: torch.Generator, like: Tensor) -> None:
        """Bases, then the spectrum in them, from two passes over the examples or one over each half; then q."""
        decay, bases, spectrum = self.settings.decay, objective, objective
        if self.settings.spectrum == "others":
            bases, spectrum = halves(objective)
        count = bases.count()
        labels = generator.get_state()
        totals: list[Totals] = [defaultdict(SharedSum) for _ in self._blocks]
        for gradients in self._gradients(bases, generator):
            for block, total, one in zip(self._blocks, totals, gradients.values(), strict=True):
                block.gather_bases(one, total)
        for block, total in zip(self._blocks, totals, strict=True):
            block.set_bases(total, count, decay, like.dtype)
        if spectrum is bases:
            generator.set_state(labels)  # the same sampled labels: the basis and its spectrum belong together
        count = spectrum.count()
        for gradients in self._gradients(spectrum, generator):
            for block, total, one in zip(self._blocks, totals, gradients.values(), strict=True):
                block.gather_spectrum(one, total)
        # The bases are orthogonal: the trace of F is the sum of its spectra.
        self._mix_trace(sum(float(total["spectrum"].value().sum()) for total in totals) / count)
        self._fitted = self.resolve_damping(None, self._mean_diagonal)
        for block, total in zip(self._blocks, totals, strict=True):
            block.set_spectrum(total, count, decay, like.dtype)
            block.closed_form(self._fitted)

    def _measure_trace(self, objective: Objective, generator: torch.Generator, like: Tensor) -> None:
        """Measure the trace of F in one pass; at first, set the damping γ and start from Q = I/γ."""
        totals: Totals = defaultdict(SharedSum)
        for gradients in self._gradients(objective, generator):
            for name, one in gradients.items():
                one.add_squared_norms(totals[name])
        self._mix_trace(sum(float(total.value().sum()) for total in totals.values()) / objective.count())
        if self._fitted is None:  # later, q continues from where steps left it, and so does its γ
            self._fitted = self.resolve_damping(None, self._mean_diagonal)
            for block in self._blocks:
                block.identity(self._fitted, like)

    def _mix_trace(self, trace: float) -> None:
        decay = 0.0 if self._fitted is None else self.settings.decay
        self._mean_diagonal = decay * self._mean_diagonal + (1 - decay) * trace / self.space.size

    def _refine(self, seen: Objective, held: Objective, generator: torch.Generator, like: Tensor) -> Fit:
        assert self._fitted is not None and isinstance(seen.batches, Sequence)
        batches, fisher = seen.batches, self.settings.fisher
        labels = generator.get_state()

        def batch(step: int) -> FisherProduct:
            one = replace(seen, batches=[batches[step % len(batches)]])
            return layer_product(one, fisher, generator) if self.settings.products == "layer" else network_product(one)

        def held_out(V: Tensor) -> Tensor:
            # Q has no part across layers, so the judge has none either; the same labels at every look.
            frozen = torch.Generator(generator.device)
            frozen.set_state(labels)
            return layer_product(held, fisher, frozen)(V)

        return fit(self._blocks, batch, held_out, self.settings, damping=self._fitted, generator=generator, like=like)

    def _gradients(self, objective: Objective, generator: torch.Generator) -> Iterator[dict[str, LayerGradients]]:
        return layer_gradients(objective, self.settings.fisher, generator=generator, shared=True)

    def inverse(self, damping: float | None = None) -> InverseFisher:
        """Q; at another damping, the curvature 1/q − γ with that damping instead."""
        if self._fitted is None:
            raise CurvatureError("the estimator has seen no examples; call update first")
        gamma = self._fitted if damping is None else damping
        return InverseFisher(DirectSum([block.operator(self._fitted, gamma) for block in self._blocks]), gamma)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a later update or cut depends on.

        By tensor of the space, moments, bases, spectrum and the present Q (see `blocks`); the damping that Q was
        fitted at and the mean diagonal of F, in float64; and with refresh='auxiliary' Adam's step count and moments of
        the parameters that led to the present Q. Nothing else is kept: not the random state, for each update is given
        its generator; not a learning rate that a back-off lowered, for each update starts at the one in the settings;
        and with refresh='moments' not Adam's state, for the parameters of the next fit lie in new bases.
        """
        state = {f"{i}.{name}": t for i, block in enumerate(self._blocks) for name, t in block.state.items()}
        for i, block in enumerate(self._blocks):
            state |= {f"{i}.adam.{name}": t for name, t in block.moments.items()}
        if self._fitted is not None:
            state["fitted"] = torch.tensor([self._fitted, self._mean_diagonal], dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        for i, block in enumerate(self._blocks):
            mine = {k.removeprefix(f"{i}."): t for k, t in state.items() if k.startswith(f"{i}.")}
            block.moments = {k.removeprefix("adam."): t for k, t in mine.items() if k.startswith("adam.")}
            block.state = {k: t for k, t in mine.items() if not k.startswith("adam.")}
        self._fitted, self._mean_diagonal = (float(x) for x in state["fitted"]) if "fitted" in state else (None, 0.0)

    @classmethod
    def statistics(cls, settings: FishLegSettings) -> Mapping[str, object]:
        """Includes the damping where Q depends on it by more than the closed form."""
        closed = settings.start == "eigenbasis" and not (settings.auxiliary_steps or settings.diagnostics)
        return super().statistics(settings) if closed else settings.model_dump(mode="json")

    def adopt(self, state: Mapping[str, Tensor]) -> bool:
        """Take over moments and bases; at another damping compute Q in closed form again."""
        self.load_state_dict(state)
        gamma = self.resolve_damping(None, self._mean_diagonal)
        if gamma != self._fitted:
            self._fitted = gamma
            for block in self._blocks:
                block.closed_form(gamma)
        return True

    @classmethod
    def check(cls, model: nn.Module, space: ParameterSpace, settings: FishLegSettings, available: Memory) -> None:
        """Also refuse a calibration set with too few batches for what it is divided into."""
        count = -(-settings.examples // settings.batch_size)
        held = settings.held_out_batches(count)
        if held and held >= count:
            needed = next(n for n in itertools.count(count + 1) if settings.held_out_batches(n) < n)
            raise SettingsError(
                f"fishleg holds out {held} of {count} calibration batches ({settings.examples} examples, batch_size "
                f"{settings.batch_size}) to judge its fit and has none to learn from; at least "
                f"{(needed - 1) * settings.batch_size + 1} examples are needed: {REMEDY}"
            )
        try:
            division(count, settings)
        except DataError as error:
            raise SettingsError(str(error)) from None
        super().check(model, space, settings, available)

    @classmethod
    def describe(cls, space: ParameterSpace, settings: FishLegSettings) -> Mapping[str, str]:
        """The factors of each tensor's part of Q, with ⊗ between its modes; see `structures`."""
        return {info.name: str(b.view) for info, b in zip(space.parameters, blocks_of(space, settings), strict=True)}

    @classmethod
    def memory(cls, space: ParameterSpace, settings: FishLegSettings) -> int:
        """Bytes of the state, and of the larger of an update and the inverse; see `memory`."""
        return peak_bytes(space, settings)
