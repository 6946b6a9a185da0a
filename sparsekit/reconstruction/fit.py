"""Reconstruction: after a cut, every layer is fitted to its outputs in the dense network.

Layer by layer, in the order in which they run, over W on its mask:

    min  E ‖W x̂ − W⁰x‖²_B + λ ‖W − W_now‖²

x̂ is the layer's input in the pruned network, whose earlier layers are already fitted; x and W⁰ are input and weights
in the dense network; B weights the outputs. Biases are fitted with the weights. Where a batch normalisation follows a
layer without a bias, its bias is fitted, because the two are one affine map. Its statistics stay, or are those of the
fitted layer's outputs, with the affine map of the dense one (`RenewedNorms`). No labels are used.

For the change δ = W − W_now this is the removal problem with H = B ⊗ Â + λI, Â = E x̂x̂ᵀ, and the gradient
B (W_now Â − C) with C = E (W⁰x) x̂ᵀ; the same operators solve it.

Reference: Hubara et al., 2021 (AdaPrune); Frantar and Alistarh, 2022 (ExactOBS); layer-wise error feedback.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from sparsekit.curvature.passes import layer_gradients
from sparsekit.curvature.sums import RunningSum, SharedSum
from sparsekit.curvature.vectors import FisherKind
from sparsekit.errors import CurvatureError, DataError, ModelError, SettingsError
from sparsekit.methods.interfaces import ReconstructionSettings
from sparsekit.problem.objective import Batch, Objective, as_found
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.reconstruction.moments import Moments
from sparsekit.reconstruction.norms import RenewedNorms
from sparsekit.reconstruction.passes import Passes
from sparsekit.reconstruction.regressions import Regression, regressions
from sparsekit.reconstruction.solve import output_weighting, solve
from sparsekit.reconstruction.uses import Piece
from sparsekit.reconstruction.weights import LayerWeights


@dataclass(frozen=True)
class LayerFit:
    """The fit of one layer.

    Attributes:
        name: of the weight, with its rows where only some of them were fitted at a time.
        error_before, error_after: E ‖W x̂ − W⁰x‖²_B / E ‖W⁰x‖²_B on the fitted examples.
        held_out_before, held_out_after: the same on held-out examples; NaN without any.
        iterations: of conjugate gradients; 0 where the solve was direct.
        residual: of the normal equations, relative to their right side.
        seconds: that the layer took, with its passes.
        left: why the layer was not fitted, and has no errors; empty where it was fitted.
    """

    name: str
    error_before: float
    error_after: float
    held_out_before: float
    held_out_after: float
    iterations: int
    residual: float
    seconds: float
    left: str = ""


class Reconstruction:
    """The regressions of one pruned network, in the order in which its layers run.

    Attributes:
        left: name of a weight of the space -> why it is not fitted.

    Args:
        model: pruned, changed in place.
        dense: the dense network, of the same architecture.
        space: the prunable weights.
        mask: removed weights stay zero.
        batches: examples, inputs first; the same at each iteration, see `pairs`.
        settings: of the reconstruction.
        weighting: name of a weight -> B (g, out/g, out/g), up to a factor; identity where there is none.
        statistics_anew: whether batch normalisations take the statistics of the fitted layers' outputs.
        seed: of the drawn positions.

    Raises:
        DataError, ModelError: there are no examples, or the two networks do not use their weights alike.
        SettingsError: fewer equations than unknowns, and no ridge.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module,
        space: ParameterSpace,
        mask: Mask,
        batches: Sequence[Batch],
        settings: ReconstructionSettings,
        *,
        weighting: Mapping[str, Tensor] | None = None,
        statistics_anew: bool = False,
        seed: int = 0,
    ) -> None:
        if not batches:
            raise DataError("reconstruction has no examples: give reconstruction.examples of one at least")
        self._batches, self._settings = batches, settings.with_ridge(trained=False)
        self._weighting, self._seed = dict(weighting or {}), seed
        self._held = min(len(batches) - 1, round(settings.held_out * len(batches)))
        cache = settings.cache_mebibytes << 20
        self._passes = Passes(model, dense, space, batches, positions=settings.positions, cache=cache)
        self._weights, self._space = LayerWeights(model, space, mask), space
        self._renewed = RenewedNorms(model, dense) if statistics_anew else None
        self._dense_weights = LayerWeights(dense, space, mask)
        self._layers, self.left = self._regressions(model, dense)
        for layer in self._layers:
            if settings.ridge == 0 and layer.rows < layer.width:
                raise SettingsError(
                    f"reconstruction of '{layer.name}' without ridge has {layer.rows:,} equations for {layer.width:,} "
                    "unknowns; give more reconstruction.examples or positions, or a reconstruction.ridge"
                )

    @classmethod
    def check(
        cls,
        model: nn.Module,
        space: ParameterSpace,
        batches: Sequence[Batch],
        settings: ReconstructionSettings,
        available: int,
    ) -> None:
        """Refuse a reconstruction that cannot work, by one pass over a batch, before the model is changed.

        Args:
            model: before any cut.
            space: the prunable weights.
            batches: as many as the reconstruction will have.
            settings: of the reconstruction.
            available: bytes that can be allocated on the model's device.

        Raises:
            DataError, ModelError, SettingsError: as the constructor, or a layer's statistics do not fit.
        """
        made = cls(model, model, space, Mask.full(space.size, next(model.parameters()).device), batches, settings)
        needed, layer = max(((layer.memory, layer.name) for layer in made._layers), default=(0, ""))
        if needed > available:
            raise SettingsError(
                f"reconstruction of '{layer}' needs {needed / 2**20:,.0f} MiB for its statistics, "
                f"{available / 2**20:,.0f} MiB are available; exclude it, or leave reconstruction out"
            )

    def __len__(self) -> int:
        return len(self._layers) * self._settings.sweeps

    def run(self, skip: int = 0, progress: Callable[[int, int], None] = lambda done, total: None) -> Iterator[LayerFit]:
        """Fit layer after layer; after each, the model has all fitted weights so far.

        A layer that cannot be fitted is not changed, and its `LayerFit.left` says why.

        Args:
            skip: number of layers that an interrupted run has fitted; the model has their weights.
            progress: called with (layers done, layers in all).
        """
        with self._passes:
            for done in range(skip, len(self)):
                index = done % len(self._layers)
                if index == 0:  # in a new sweep all layers change again
                    self._passes.forget()
                progress(done, len(self))
                yield self._fit(index)
        if self._renewed is not None:
            self._renewed.restore()
        progress(len(self), len(self))

    def _regressions(self, model: nn.Module, dense: nn.Module) -> tuple[list[Regression], dict[str, str]]:
        with as_found(model), as_found(dense):
            calls = {which: self._passes.calls(which) for which in ("pruned", "dense")}
        examples = [len(inputs) for inputs, _ in self._batches]
        return regressions(
            model,
            self._space,
            calls,
            self._passes.others,
            examples=examples[0],
            fitted=sum(examples[: len(examples) - self._held]),
            positions=self._settings.positions,
            norms=self._settings.norms,
        )

    @torch.no_grad()
    def _fit(self, index: int) -> LayerFit:
        begun, layer, nan = time.perf_counter(), self._layers[index], float("nan")
        name = layer.name
        if not _whole(layer.piece, self._space):
            name += f"[{layer.piece.start}:{layer.piece.stop}]"
        W = self._weights.read(layer)
        B = self._weighting.get(layer.name)
        if B is not None:
            B = output_weighting(B, layer.piece.start, layer.piece.stop, W)
        fitted, held = Moments(B), Moments(B)
        try:
            self._passes.distrust(layer)
            bias = self._weights.bias(layer.bias)
            for number, inputs in enumerate(self._passes.inputs()):
                generator = torch.Generator().manual_seed((self._seed * 100_003 + index * 1009 + number) % 2**63)
                moments = fitted if number < len(self._batches) - self._held else held
                self._passes.gather(layer, number, inputs, generator, bias, moments)
            solution = solve(
                W,
                self._weights.kept(layer, W),
                B,
                fitted,
                biased=layer.bias is not None,
                ridge=self._settings.ridge or 0.0,
                smallest_ridge=torch.finfo(self._weights.tensor(layer.piece).dtype).eps,
            )
        except (CurvatureError, ModelError) as error:
            return LayerFit(name, nan, nan, nan, nan, 0, nan, time.perf_counter() - begun, str(error))
        finally:
            self._passes.rest()
        new, before, scale, iterations, residual = solution
        errors = [moments.error(V, scale) for moments in (fitted, held) for V in (before, new)]
        if self._renewed is not None:
            kept = self._weights.kept(layer, W)
            new = self._renewed.renew(layer, self._dense_weights.read(layer) * kept, new, fitted, scale)
        self._weights.write(layer, new, scale)
        seconds = time.perf_counter() - begun
        return LayerFit(name, errors[0], errors[1], errors[2], errors[3], iterations, residual, seconds)


def output_moments(objective: Objective, fisher: FisherKind, generator: torch.Generator) -> dict[str, Tensor]:
    """E G_n G_nᵀ of the weights' gradient rows (see `gradient_rows`): name -> (groups, out/groups, out/groups).

    Only for weights of two or more dimensions. As a weighting, outputs with more sensitive weights count more.
    """
    totals: defaultdict[str, RunningSum] = defaultdict(SharedSum)
    matrices = [info for info in objective.space.parameters if len(info.shape) > 1]
    for gradients in layer_gradients(objective, fisher, generator=generator, shared=True):
        for info in matrices:
            shape = (info.groups, info.shape[0] // info.groups, prod(info.shape[1:]))
            gradients[info.name].add_moments(shape, {0: totals[info.name]})
    return {name: total.value() for name, total in totals.items()}


def _whole(piece: Piece, space: ParameterSpace) -> bool:
    return piece.stop - piece.start == space[piece.name].shape[0]
