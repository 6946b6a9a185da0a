"""The FishLeg estimator: Q ≈ (F + γI)⁻¹ layer by layer, started in closed form, refined by auxiliary steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sparsekit import (
    CurvatureError,
    CurvatureEstimator,
    DataError,
    EstimatorSettings,
    InverseFisher,
    Mask,
    Objective,
    ParameterSpace,
)
from sparsekit.curvature import GaussNewton, gradient_rows
from sparsekit.linalg import DirectSum, LinearOperator, Principal
from sparsekit_fishleg.auxiliary import FisherProduct, Fit, fit
from sparsekit_fishleg.blocks import Block, DiagonalBlock, KroneckerBlock


class FishLegSettings(EstimatorSettings):
    """Settings of `fishleg`."""

    examples: int = Field(1024, ge=2, description="calibration examples for each estimate")
    structure: Literal["eigenbasis", "kronecker"] = Field(
        "eigenbasis", description="eigenbasis: two factors with an inner diagonal; kronecker: two factors"
    )
    start: Literal["eigenbasis", "identity"] = Field(
        "eigenbasis", description="of the fit: the closed form in the Kronecker eigenbasis, or I/γ"
    )
    refresh: Literal["moments", "auxiliary"] = Field(
        "moments",
        description="later updates: assimilate new moments in closed form, then refine; or auxiliary steps alone",
    )
    decay: float = Field(
        0.2, ge=0, lt=1, description="weight of what was known when new moments are assimilated; 0: afresh"
    )
    after_cut: Literal["condition", "learn"] = Field(
        "condition",
        description="condition the full inverse on removed weights at removal, or learn that of the survivors",
    )
    auxiliary_steps: int = Field(20, ge=0, description="at most so many auxiliary steps for each update")
    auxiliary_learning_rate: float = Field(1e-3, gt=0, description="Adam's, on log q and on relative factors")
    probes: int = Field(8, ge=1, description="Gaussian u for each auxiliary step")
    check_every: int = Field(5, ge=1, description="auxiliary steps between looks at the held-out residual")
    held_out: float = Field(0.1, gt=0, lt=1, description="fraction of the examples kept for that residual")
    preconditioned: bool = Field(True, description="weight the residual by Q, so that all directions learn alike")
    products: Literal["layer", "network"] = Field(
        "layer", description="Fisher products within layers, or exact Gauss-Newton products of the network"
    )
    max_factor: int = Field(8192, ge=1, description="a tensor with a longer side gets a diagonal block")


class FishLeg(CurvatureEstimator):
    """The inverse Fisher, learned: Q(λ) minimises the Legendre-Fenchel objective A(λ), and is kept across cuts.

    Reference: Garcia, Freddi, Fotiadis, Li, Vakili, Bernacchia and Hennequin, 2023 (Fisher-Legendre optimisation);
    McGowan et al., 2024 (FishLeg surgeon).
    """

    name: ClassVar[str] = "fishleg"
    Settings: ClassVar[type[EstimatorSettings]] = FishLegSettings

    def __init__(self, space: ParameterSpace, settings: FishLegSettings) -> None:
        super().__init__(space, settings)
        self._blocks: list[Block] = [_block(info.shape, settings) for info in space.parameters]
        self._sizes = [info.size for info in space.parameters]
        self._fitted: float | None = None  # the damping that Q was fitted at
        self._mean_diagonal = 0.0
        self._kept: Tensor | None = None

    def update(self, objective: Objective, *, generator: torch.Generator) -> Mapping[str, float]:
        """Assimilate the examples: closed-form moments (unless told otherwise), then auxiliary steps."""
        batches = list(objective.batches)
        held = max(1, round(self.settings.held_out * len(batches))) if self.settings.auxiliary_steps else 0
        if held and len(batches) < 2:
            raise DataError(
                f"fishleg keeps a batch of examples to judge its fit and needs another to learn from; the "
                f"calibration set has {len(batches)} batch of {self.settings.batch_size}: give more examples, lower "
                "estimator.batch_size, or set estimator.auxiliary_steps=0"
            )
        first = self._fitted is None
        seen = Objective(objective.model, objective.likelihood, batches[: len(batches) - held], objective.space)
        like = torch.empty(0, dtype=objective.dtype, device=objective.device)
        if first or self.settings.refresh == "moments":
            self._assimilate(seen, generator, like)
        assert self._fitted is not None
        figures = {"mean_diagonal": self._mean_diagonal}
        if self.settings.auxiliary_steps:
            done = self._refine(seen, batches[len(batches) - held :], generator, like)
            figures |= {
                "auxiliary_steps": float(done.steps),
                "auxiliary_back_offs": float(done.back_offs),
                "residual_before": done.before,
                "residual_after": done.after,
            }
        return figures

    def _assimilate(self, objective: Objective, generator: torch.Generator, like: Tensor) -> None:
        """Bases, then the spectrum in them, from two passes over the examples; q in closed form."""
        count, decay = objective.count(), self.settings.decay
        identity = self.settings.start == "identity"
        labels = generator.get_state()
        totals: list[dict[str, Tensor]] = [{} for _ in self._blocks]
        trace = 0.0
        for rows in self._rows(objective, generator):
            trace += float(rows.double().square().sum())
            if not identity:
                for block, total, part in zip(self._blocks, totals, rows.split(self._sizes, dim=1), strict=True):
                    block.gather_bases(part, total)
        mean = trace / count / self.space.size
        self._mean_diagonal = mean if self._fitted is None else decay * self._mean_diagonal + (1 - decay) * mean
        self._fitted = self.resolve_damping(None, self._mean_diagonal)
        if identity:
            for block in self._blocks:
                if not block.state:
                    block.identity(self._fitted, like)
            return
        for block, total in zip(self._blocks, totals, strict=True):
            block.set_bases(total, count, decay, like.dtype)
        totals = [{} for _ in self._blocks]
        generator.set_state(labels)  # the same sampled labels: the basis and its spectrum belong together
        for rows in self._rows(objective, generator):
            for block, total, part in zip(self._blocks, totals, rows.split(self._sizes, dim=1), strict=True):
                block.gather_spectrum(part, total)
        for block, total in zip(self._blocks, totals, strict=True):
            block.set_spectrum(total, count, decay, like.dtype)
            block.closed_form(self._fitted)

    def _refine(
        self, seen: Objective, held: list[tuple[Tensor, Tensor]], generator: torch.Generator, like: Tensor
    ) -> Fit:
        assert self._fitted is not None
        batches = list(seen.batches)
        labels = generator.get_state()

        def batch(step: int) -> FisherProduct:
            return self._product(_on(seen, [batches[step % len(batches)]]), generator)

        def held_out(V: Tensor) -> Tensor:
            frozen = torch.Generator(generator.device)
            frozen.set_state(labels)  # the same labels at every look
            return self._product(_on(seen, held), frozen)(V)

        return fit(
            self._blocks,
            batch,
            held_out,
            damping=self._fitted,
            steps=self.settings.auxiliary_steps,
            probes=self.settings.probes,
            learning_rate=self.settings.auxiliary_learning_rate,
            check_every=self.settings.check_every,
            preconditioned=self.settings.preconditioned,
            keep=self._kept if self.settings.after_cut == "learn" else None,
            generator=generator,
            size=self.space.size,
            like=like,
        )

    def _product(self, objective: Objective, generator: torch.Generator) -> FisherProduct:
        """V ↦ F V by the objective's examples: within layers, one forward and backward pass for all columns."""
        if self.settings.products == "network":
            return lambda V: GaussNewton(objective) @ V

        def product(V: Tensor) -> Tensor:
            total = torch.zeros_like(V)
            for rows in self._rows(objective, generator):
                parts = zip(rows.split(self._sizes, dim=1), V.split(self._sizes), strict=True)
                total += torch.cat([part.mT @ (part @ v) for part, v in parts])
            return total / objective.count()

        return product

    def _rows(self, objective: Objective, generator: torch.Generator) -> Any:
        return gradient_rows(objective, self.settings.fisher, generator=generator)

    def inverse(self, damping: float | None = None) -> InverseFisher:
        """Q; at another damping, the curvature 1/q − γ that it stands for is damped anew."""
        if self._fitted is None:
            raise CurvatureError("the estimator has seen no examples; call update first")
        gamma = self._fitted if damping is None else damping
        operator: LinearOperator = DirectSum([block.operator(self._fitted, gamma) for block in self._blocks])
        if self.settings.after_cut == "learn" and self._kept is not None:
            operator = Principal(operator, self._kept)
        return InverseFisher(operator, gamma)

    def shrink(self, mask: Mask) -> None:
        """Remember the survivors: with after_cut='learn', u lives on them from now on."""
        self._kept = mask.kept if mask.removed_count else None

    def state_dict(self) -> dict[str, Tensor]:
        """The blocks' factors, spectra and moments, and the damping they were fitted at."""
        state = {f"{i}.{name}": t for i, block in enumerate(self._blocks) for name, t in block.state.items()}
        if self._fitted is not None:
            state["fitted"] = torch.tensor([self._fitted, self._mean_diagonal], dtype=torch.float64)
        if self._kept is not None:
            state["kept"] = self._kept
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        for i, block in enumerate(self._blocks):
            prefix = f"{i}."
            block.state = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
        if "fitted" in state:
            self._fitted, self._mean_diagonal = (float(x) for x in state["fitted"])
        self._kept = state.get("kept")

    @classmethod
    def memory(cls, space: ParameterSpace, settings: Any) -> int:
        """Factors (bases and inverses, float32; moments, float64), training copies, spectra, and rows."""
        factors = 0
        for info in space.parameters:
            block = _block(info.shape, settings)
            if isinstance(block, KroneckerBlock):
                factors += block.rows**2 + block.columns**2
        training = 5 if settings.auxiliary_steps else 0  # parameters, gradients, two Adam moments, best so far
        rows = settings.batch_size * space.size * 4 * 3
        return factors * (8 + 4 * (2 + training)) + space.size * 4 * (3 + training) + rows


def _block(shape: tuple[int, ...], settings: FishLegSettings) -> Block:
    size = torch.Size(shape).numel()
    if len(shape) < 2 or max(shape[0], size // shape[0]) > settings.max_factor:
        return DiagonalBlock(size)
    return KroneckerBlock(shape[0], size // shape[0], inner=settings.structure == "eigenbasis")


def _on(objective: Objective, batches: list[tuple[Tensor, Tensor]]) -> Objective:
    return Objective(objective.model, objective.likelihood, batches, objective.space)
