"""The FishLeg estimator: Q ≈ (F + γI)⁻¹ layer by layer, started in closed form, refined by auxiliary steps."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sparsekit import (
    CurvatureError,
    CurvatureEstimator,
    DataError,
    EstimatorSettings,
    InverseFisher,
    Mask,
    Memory,
    Objective,
    ParameterSpace,
    SettingsError,
)
from sparsekit.curvature import GaussNewton, gradient_rows
from sparsekit.linalg import DirectSum, LinearOperator, Principal
from sparsekit_fishleg.auxiliary import FisherProduct, Fit, fit
from sparsekit_fishleg.blocks import Block
from sparsekit_fishleg.structures import Structure, view

_REMEDY = "give more estimator.examples, lower estimator.batch_size, or set estimator.auxiliary_steps=0"


class FishLegSettings(EstimatorSettings):
    """Settings of `fishleg`."""

    examples: int = Field(
        1024, ge=2, description="calibration examples for each estimate; by default as many as there are, at most 1024"
    )
    structure: Structure = Field(
        "eigenbasis",
        description="eigenbasis: two factors with an inner diagonal; kronecker: two factors; outer: those with an "
        "outer diagonal; frozen: eigenbasis, of which only the diagonal is trained; three-factor: outputs, inputs and "
        "kernel of a convolution; blocks: a dense block for each output; dense: one for each tensor; diagonal",
    )
    start: Literal["eigenbasis", "identity"] = Field(
        "eigenbasis", description="of the fit: the closed form in the Kronecker eigenbasis, or I/γ"
    )
    refresh: Literal["moments", "auxiliary"] = Field(
        "moments",
        description="later updates: assimilate new moments in closed form, then refine; or auxiliary steps alone, in "
        "which Adam goes on where it was, at the damping of the first update",
    )
    decay: float = Field(
        0.2, ge=0, lt=1, description="weight of what was known when new moments are assimilated; 0: afresh"
    )
    after_cut: Literal["condition", "learn"] = Field(
        "condition",
        description="condition the full inverse on removed weights at removal, or learn that of the survivors, which "
        "was worse wherever it was tried",
    )
    auxiliary_steps: int = Field(0, ge=0, description="at most so many for each update, not counting undone ones")
    auxiliary_learning_rate: float = Field(1e-3, gt=0, description="Adam's, on log q and on relative factors")
    probes: int = Field(8, ge=1, description="Gaussian u for each auxiliary step")
    check_every: int = Field(5, ge=1, description="auxiliary steps between looks at the held-out residual")
    held_out: float = Field(0.1, gt=0, lt=1, description="fraction of the batches, one at least, for that residual")
    preconditioned: bool = Field(True, description="weight the residual by Q, so that all directions learn alike")
    products: Literal["layer", "network"] = Field(
        "layer", description="Fisher products within layers, or exact Gauss-Newton products of the network"
    )
    diagnostics: bool = Field(
        False, description="hold out examples, and report for each tensor what `FishLeg.update` says it returns"
    )
    max_factor: int = Field(8192, ge=1, description="longer sides of a tensor are taken coordinate by coordinate")
    dense_below: int = Field(
        0, ge=0, description="weights of at most so many, of layers with a rule, get one dense block"
    )
    state_mebibytes: int | None = Field(
        None, ge=1, description="bound of the state: longer sides lose their factors until it holds; null: none"
    )

    @model_validator(mode="after")
    def _steps_where_they_are_needed(self) -> Self:
        for name, value in (("refresh", "auxiliary"), ("after_cut", "learn"), ("start", "identity")):
            if getattr(self, name) == value and not self.auxiliary_steps:
                raise ValueError(f"{name}={value} learns by auxiliary steps; set auxiliary_steps, 20 for example")
        return self


class FishLeg(CurvatureEstimator):
    """The inverse Fisher, learned: Q(λ) minimises the Legendre-Fenchel objective A(λ), and is kept across cuts.

    Reference: Garcia, Freddi, Fotiadis, Li, Vakili, Bernacchia and Hennequin, 2023 (Fisher-Legendre optimisation);
    McGowan et al., 2024 (FishLeg surgeon).
    """

    name: ClassVar[str] = "fishleg"
    Settings: ClassVar[type[EstimatorSettings]] = FishLegSettings
    memory_settings: ClassVar[tuple[str, ...]] = ("batch_size", "probes", "max_factor")

    def __init__(self, space: ParameterSpace, settings: FishLegSettings) -> None:
        super().__init__(space, settings)
        self._blocks = _blocks(space, settings)
        self._sizes = [info.size for info in space.parameters]
        self._fitted: float | None = None  # the damping that Q was fitted at
        self._mean_diagonal = 0.0
        self._kept: Tensor | None = None

    def update(self, objective: Objective, *, generator: torch.Generator) -> Mapping[str, float]:
        """Assimilate the examples: closed-form moments (unless told otherwise), then auxiliary steps.

        Returns:
            `mean_diagonal`, of F without damping; with auxiliary steps their number and that of back-offs, and the
            held-out residual (see `auxiliary.fit`) before and after. With `diagnostics` for each tensor, against the
            held-out examples' layer-block Fisher at the end: `{name}/residual`, ‖r‖²_Q / ‖u‖²_Q;
            `{name}/auxiliary_loss`, (½ (Qu)ᵀH(Qu) − uᵀQu) / ½ uᵀQu, −1 at Q = H⁻¹; `{name}/diagonal_correlation`, that
            of log diag Q⁻¹ with log diag H; `{name}/diagonal_ratio`, the exponential of their mean difference.

        Raises:
            DataError: no batch is left to learn from once some are held out.
            CurvatureError: a gradient or a product is not finite, or the auxiliary fit diverges.
        """
        given, settings = objective.batches, self.settings
        batches = given if isinstance(given, Sequence) else list(given)  # a sequence may be lazy, or tell of progress
        held = _held_out(len(batches), settings)
        if held and held >= len(batches):
            raise DataError(
                f"fishleg holds out {held} of {len(batches)} calibration batches to judge its fit and has none to "
                f"learn from; {_REMEDY}"
            )
        objective = replace(objective, share=objective.mean_share)  # parts of it weigh their examples as the whole does
        seen = replace(objective, batches=batches[: len(batches) - held])
        like = torch.empty(0, dtype=objective.dtype, device=objective.device)
        if self._fitted is None or settings.refresh == "moments":
            self._assimilate(seen, generator, like)
        figures = {"mean_diagonal": self._mean_diagonal}
        kept_back = replace(objective, batches=batches[len(batches) - held :])
        if settings.auxiliary_steps:
            done = self._refine(seen, kept_back, generator, like)
            figures |= {
                "auxiliary_steps": float(done.steps),
                "auxiliary_back_offs": float(done.back_offs),
                "residual_before": done.before,
                "residual_after": done.after,
            }
        if settings.diagnostics:
            figures |= self._diagnose(kept_back, generator, like)
        return figures

    def _diagnose(self, held: Objective, generator: torch.Generator, like: Tensor) -> dict[str, float]:
        """See `update`."""
        assert self._fitted is not None
        figures, operator, gamma = {}, self.inverse().operator, self._fitted
        shape = (self.space.size, self.settings.probes)
        u = torch.randn(shape, generator=generator, device=generator.device).to(like)
        kept = self._kept if self.settings.after_cut == "learn" else None  # then Q is of the survivors alone
        inside = 1.0 if kept is None else kept.to(like)[:, None]
        u = u * inside
        V = operator @ u
        image, squares, count = torch.zeros_like(V), torch.zeros_like(u[:, 0]), held.count()
        for rows in self._rows(held, generator):
            squares += rows.square().sum(0) / count
            for info in self.space.parameters:
                part = rows[:, info.slice]
                image[info.slice] += part.mT @ (part @ V[info.slice]) / count
        HV = inside * image + gamma * V
        r = HV - u
        Qr, model = operator @ r, operator.inverse_diagonal()
        for info in self.space.parameters:
            at = info.slice
            energy = float((u[at] * V[at]).sum())
            if not energy > 0:  # removed whole
                continue
            figures[f"{info.name}/residual"] = float((r[at] * Qr[at]).sum()) / energy
            figures[f"{info.name}/auxiliary_loss"] = (float((V[at] * HV[at]).sum()) - 2 * energy) / energy
            if kept is None:  # diag (Q_SS)⁻¹ is not known
                logs = torch.stack([model[at], squares[at] + gamma]).double().log()
                if bool((logs.std(1) > 0).all()):
                    figures[f"{info.name}/diagonal_correlation"] = float(torch.corrcoef(logs)[0, 1])
                figures[f"{info.name}/diagonal_ratio"] = float((logs[0] - logs[1]).mean().exp())
        return figures

    def _assimilate(self, objective: Objective, generator: torch.Generator, like: Tensor) -> None:
        """Bases, then the spectrum in them, from two passes over the examples; q in closed form."""
        count, decay = objective.count(), self.settings.decay
        identity = self.settings.start == "identity"
        labels = generator.get_state()
        totals: list[dict[str, Tensor]] = [{} for _ in self._blocks]
        trace = 0.0
        for rows in self._rows(objective, generator):
            trace += float(rows.norm(dim=1).double().square().sum())
            if not identity:
                for block, total, part in zip(self._blocks, totals, rows.split(self._sizes, dim=1), strict=True):
                    block.gather_bases(part, total)
        mean = trace / count / self.space.size
        self._mean_diagonal = mean if self._fitted is None else decay * self._mean_diagonal + (1 - decay) * mean
        if identity:
            if self._fitted is None:  # later, q goes on from where steps left it, and so does its γ
                self._fitted = self.resolve_damping(None, self._mean_diagonal)
                for block in self._blocks:
                    block.identity(self._fitted, like)
            return
        self._fitted = self.resolve_damping(None, self._mean_diagonal)
        for block, total in zip(self._blocks, totals, strict=True):
            block.set_bases(total, count, decay, like.dtype)
        generator.set_state(labels)  # the same sampled labels: the basis and its spectrum belong together
        for rows in self._rows(objective, generator):
            for block, total, part in zip(self._blocks, totals, rows.split(self._sizes, dim=1), strict=True):
                block.gather_spectrum(part, total)
        for block, total in zip(self._blocks, totals, strict=True):
            block.set_spectrum(total, count, decay, like.dtype)
            block.closed_form(self._fitted)

    def _refine(self, seen: Objective, held: Objective, generator: torch.Generator, like: Tensor) -> Fit:
        assert self._fitted is not None and isinstance(seen.batches, Sequence)
        batches = seen.batches
        within_layers = self.settings.products == "layer"
        labels = generator.get_state()

        def batch(step: int) -> FisherProduct:
            one = replace(seen, batches=[batches[step % len(batches)]])
            return self._layer_product(one, generator) if within_layers else network_product(one)

        def held_out(V: Tensor) -> Tensor:
            # Q has no part across layers, so the judge has none either; the same labels at every look.
            frozen = torch.Generator(generator.device)
            frozen.set_state(labels)
            return self._layer_product(held, frozen)(V)

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
            carry=self.settings.refresh == "auxiliary",
            keep=self._kept if self.settings.after_cut == "learn" else None,
            generator=generator,
            size=self.space.size,
            like=like,
        )

    def _layer_product(self, objective: Objective, generator: torch.Generator) -> FisherProduct:
        """V (n, k) ↦ F V, F cut to one block a tensor: one forward and backward pass for all columns."""

        def product(V: Tensor) -> Tensor:
            total = torch.zeros_like(V)
            for rows in self._rows(objective, generator):
                parts = zip(rows.split(self._sizes, dim=1), V.split(self._sizes), total.split(self._sizes), strict=True)
                for part, v, out in parts:
                    out.add_(part.mT @ (part @ v))
            return total.div_(objective.count())

        return product

    def _rows(self, objective: Objective, generator: torch.Generator) -> Iterator[Tensor]:
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
        """All that a later update or cut depends on.

        By tensor of the space, moments, bases, spectrum and the present Q (see `blocks`); the damping that Q was
        fitted at and the mean diagonal of F, in float64; the kept weights (n,) bool, once some are removed; and with
        refresh='auxiliary' Adam's step count and moments of the parameters that led to the present Q. Nothing else
        is kept: not the random state, for each update is given its generator; not a learning rate that a back-off
        lowered, for each update starts at the one in the settings; and with refresh='moments' not Adam's state, for
        the parameters of the next fit lie in new bases.
        """
        state = {f"{i}.{name}": t for i, block in enumerate(self._blocks) for name, t in block.state.items()}
        for i, block in enumerate(self._blocks):
            state |= {f"{i}.adam.{name}": t for name, t in block.moments.items()}
        if self._fitted is not None:
            state["fitted"] = torch.tensor([self._fitted, self._mean_diagonal], dtype=torch.float64)
        if self._kept is not None:
            state["kept"] = self._kept
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        for i, block in enumerate(self._blocks):
            mine = {k.removeprefix(f"{i}."): t for k, t in state.items() if k.startswith(f"{i}.")}
            block.moments = {k.removeprefix("adam."): t for k, t in mine.items() if k.startswith("adam.")}
            block.state = {k: t for k, t in mine.items() if not k.startswith("adam.")}
        self._fitted, self._mean_diagonal = (float(x) for x in state["fitted"]) if "fitted" in state else (None, 0.0)
        self._kept = state.get("kept")

    @classmethod
    def statistics(cls, settings: Any) -> Mapping[str, Any]:
        """With the damping too, where Q was fitted at it and not only closed in it."""
        closed = settings.start == "eigenbasis" and not (settings.auxiliary_steps or settings.diagnostics)
        return super().statistics(settings) if closed else settings.model_dump(mode="json")

    def adopt(self, state: Mapping[str, Tensor]) -> bool:
        """Moments and bases are taken over as they are; Q is closed anew where the damping is another one."""
        self.load_state_dict(state)
        gamma = self.resolve_damping(None, self._mean_diagonal)
        if gamma != self._fitted:
            self._fitted = gamma
            for block in self._blocks:
                block.closed_form(gamma)
        return True

    @classmethod
    def check(cls, model: nn.Module, space: ParameterSpace, settings: Any, available: Memory) -> None:
        """Also refuse a calibration set of which nothing is left to learn from once a share is held out."""
        count = -(-settings.examples // settings.batch_size)
        held = _held_out(count, settings)
        if held and held >= count:
            needed = next(n for n in itertools.count(count + 1) if _held_out(n, settings) < n)
            raise SettingsError(
                f"fishleg holds out {held} of {count} calibration batches ({settings.examples} examples, batch_size "
                f"{settings.batch_size}) to judge its fit and has none to learn from; at least "
                f"{(needed - 1) * settings.batch_size + 1} examples are needed: {_REMEDY}"
            )
        super().check(model, space, settings, available)

    @classmethod
    def describe(cls, space: ParameterSpace, settings: Any) -> Mapping[str, str]:
        """The factors of each tensor's share of Q, ⊗ between its modes; see `structures`."""
        return {info.name: str(b.view) for info, b in zip(space.parameters, _blocks(space, settings), strict=True)}

    @classmethod
    def memory(cls, space: ParameterSpace, settings: Any) -> int:
        """Bytes of the state, and of the larger of what assimilation, the fit and the inverse take besides.

        For a model in float32. Without what the network's own passes take (activations, patches of convolutions),
        which depends on the inputs. Counted from the code, and held against measured peaks in the tests.
        """
        blocks = _blocks(space, settings)
        sizes = [size for block in blocks for size in block.factor_sizes]
        factors, widest = sum(sizes), max(sizes, default=0)
        size, longest = space.size, max(block.size for block in blocks)
        carried = settings.refresh == "auxiliary" and settings.auxiliary_steps > 0
        parameters = 4 * (factors + size)
        state = _state_bytes(blocks, settings)
        # By tensor, in one piece, and those of the batch before; copies of one tensor's in products.
        rows = 4 * settings.batch_size * 3 * (size + longest)
        # Sums in float64; an eigendecomposition in float64 with its workspace, and the mean, mix and turn around it.
        assimilating = 8 * factors + 8 * size + 64 * widest + rows
        # Parameters, gradients, Adam's moments, the best so far and its successor, moments of these where they are
        # carried; u, r, Q u and F Q u with temporaries, and the graph of one tensor's Q u.
        fitting = (6 + 4 * carried) * parameters + 32 * widest + 4 * settings.probes * (6 * size + 8 * longest) + rows
        # Inverses of L and R, taken in float64.
        inverting = 4 * factors + 32 * widest + 16 * size
        return state + max(assimilating, inverting, fitting if settings.auxiliary_steps else 0)


def _blocks(space: ParameterSpace, settings: FishLegSettings) -> list[Block]:
    def made(max_factor: int) -> list[Block]:
        limits = {"max_factor": max_factor, "dense_below": settings.dense_below}
        return [Block(view(info, settings.structure, **limits), settings.structure) for info in space.parameters]

    blocks = made(settings.max_factor)
    if settings.state_mebibytes is None:
        return blocks
    sides = sorted({0, *(block.view.modes[i] for block in blocks for i in block.factored)})
    bound = settings.state_mebibytes << 20
    largest = bisect_left(sides, True, key=lambda side: _state_bytes(made(side), settings) > bound)
    return made(sides[max(largest - 1, 0)])


def _state_bytes(blocks: Sequence[Block], settings: FishLegSettings) -> int:
    """Bytes of `state_dict`, of a model in float32."""
    factors, size = sum(sum(block.factor_sizes) for block in blocks), sum(block.size for block in blocks)
    carried = settings.refresh == "auxiliary" and settings.auxiliary_steps > 0
    # Bases and trained factors; spectrum, q and the kept weights, an outer diagonal; Adam's moments.
    trained = settings.auxiliary_steps > 0 and settings.structure != "frozen"
    state = 4 * (1 + trained) * factors + (4 + 4 + 1) * size + 2 * carried * 4 * (factors + size)
    return state + 8 * size * (settings.structure == "outer")


def _held_out(batches: int, settings: FishLegSettings) -> int:
    """How many of the calibration batches judge Q; none where nobody asks for a judgement."""
    judged = settings.auxiliary_steps or settings.diagnostics
    return max(1, round(settings.held_out * batches)) if judged else 0


def network_product(objective: Objective) -> FisherProduct:
    """V (n, k) ↦ F V, F of the whole network.

    Raises:
        CurvatureError: F V is not finite although V is.
    """

    def product(V: Tensor) -> Tensor:
        # F is linear: at unit scale a fit that runs away cannot be mistaken for a network that overflows.
        scale = V.abs().amax().clamp_min(torch.finfo(V.dtype).tiny)
        image = GaussNewton(objective) @ (V / scale)
        if bool(scale.isfinite()) and not bool(image.isfinite().all()):
            raise CurvatureError(
                "Gauss-Newton products of the network are not finite; check the data, the loss and the weights"
            )
        return scale * image

    return product
