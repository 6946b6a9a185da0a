"""Reconstruction: after a cut, every layer is fitted anew to what it gives in the dense network.

Layer by layer, in the order in which they run, over W on its mask:

    min  E ‖W x̂ − W⁰x‖²_B + λ ‖W − W_now‖²

x̂ is the layer's input in the pruned network, with the layers before it fitted already; x and W⁰ are input and weights
in the dense one; B weights the outputs. Biases are fitted with the weights, and so is that of a batch normalisation
that follows a layer without one, as together they are one affine map; its statistics stay as they are. No labels are
used.
In the change δ = W − W_now it is the removal problem with H = B ⊗ Â + λI, Â = E x̂x̂ᵀ, and the gradient B (W_now Â − C)
with C = E (W⁰x) x̂ᵀ; the same operators solve it.

Reference: Hubara et al., 2021 (AdaPrune); Frantar and Alistarh, 2022 (ExactOBS); layer-wise error feedback.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from sparsekit.curvature.attention import plain_attention
from sparsekit.curvature.calls import Call, Norm, Piece, Seen, WeightCalls
from sparsekit.curvature.rows import gradient_rows
from sparsekit.errors import CurvatureError, DataError, ModelError, SettingsError
from sparsekit.interfaces import ReconstructionSettings
from sparsekit.linalg import KroneckerDiagonal, LinearOperator, RepeatedBlock
from sparsekit.objective import Batch, Objective, as_found, pairs
from sparsekit.parameters import Mask, ParameterSpace
from sparsekit.replay import Replay

#: Inputs of a row up to which its own system is factorised; beyond, all rows are solved by conjugate gradients.
DIRECT = 1024

#: Added to an output weighting B, relative to the mean of its diagonal: outputs that B forgets keep a say.
OUTPUT_DAMPING = 1.0


@dataclass(frozen=True)
class LayerFit:
    """How one layer was fitted.

    Attributes:
        name: of the weight; with its rows where only some of them were fitted at a time.
        error_before, error_after: E ‖W x̂ − W⁰x‖²_B / E ‖W⁰x‖²_B on the examples that were fitted.
        held_out_before, held_out_after: the same on examples that were not; NaN without any.
        iterations, residual: of conjugate gradients; 0 where the solve was direct.
        seconds: for the layer, passes included.
    """

    name: str
    error_before: float
    error_after: float
    held_out_before: float
    held_out_after: float
    iterations: int
    residual: float
    seconds: float


class _Reached(Exception):
    """The last call of the layer in question was seen; the rest of the pass is not needed."""


@dataclass
class _Layer:
    """One regression: a weight, or rows of it, with all the calls that use them.

    `width` counts the inputs of a row, with the bias where it is fitted too; `rows` the equations there will be.
    """

    piece: Piece
    groups: int
    width: int
    calls: int
    bias: Piece | None
    rows: int
    norms: tuple[Norm, Norm] | None = None  # that follows, in the pruned and in the dense network; `bias` is of it

    def target(self, Z: Tensor, bias: Tensor | None) -> Tensor:
        """Outputs (g, rows, out) that give in the pruned network what Z gives in the dense one, once normalised.

        Args:
            Z: outputs in the dense network.
            bias: of the normalisation in the pruned one, (out,), as it is now.
        """
        if self.norms is None or bias is None:
            return Z
        now, dense = self.norms
        factor = torch.where(now.scale == 0, 1.0, dense.scale / now.scale)
        shift = torch.where(now.scale == 0, 0.0, now.mean + (dense.bias - bias) / now.scale - factor * dense.mean)
        return Z * factor.view(self.groups, 1, -1) + shift.view(self.groups, 1, -1)

    @property
    def name(self) -> str:
        return self.piece.name


class _Moments:
    """Â = E x̂x̂ᵀ, C = E z x̂ᵀ and E zzᵀ over rows, by group, in float64; products are taken in the model's type."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, X: Tensor, Z: Tensor) -> None:
        """Inputs (g, rows, in) and targets (g, rows, out)."""
        products = [part.double() for part in (X.mT @ X, Z.mT @ X, Z.mT @ Z)]
        self._sums = (
            (products[0], products[1], products[2])
            if self._sums is None
            else (self._sums[0] + products[0], self._sums[1] + products[1], self._sums[2] + products[2])
        )
        self.count += X.shape[1]

    def means(self, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """(Â, C, E zzᵀ), the last input, a constant one, multiplied by `scale`, where there is one."""
        assert self._sums is not None
        A, C, Z = (total / self.count for total in self._sums)
        if scale is not None:
            A[:, -1] *= scale
            A[:, :, -1] *= scale
            C[:, :, -1] *= scale
        return A, C, Z


class Reconstruction:
    """The regressions of one pruned network, in the order in which its layers run.

    Attributes:
        left: name of a weight of the space -> why it is left as it is.

    Args:
        model: pruned, changed in place.
        dense: the network that it came from, of the same architecture.
        space: the prunable weights.
        mask: removed weights stay zero.
        batches: examples, inputs first; the same at each iteration, see `pairs`.
        settings: how.
        weighting: name of a weight -> B (g, out/g, out/g), up to a factor; identity where there is none.
        seed: of the positions.

    Raises:
        DataError, ModelError: there are no examples to fit, or the two networks do not run alike.
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
        seed: int = 0,
    ) -> None:
        self._networks = {"pruned": model, "dense": dense}
        self._modes = {which: WeightCalls(network, space) for which, network in self._networks.items()}
        self._space, self._mask, self._batches, self._settings = space, mask, batches, settings
        self._weighting, self._seed = dict(weighting or {}), seed
        self._held = min(len(batches) - 1, max(1, round(settings.held_out * len(batches)))) if settings.held_out else 0
        if not batches:
            raise DataError("reconstruction has no examples: give reconstruction.examples of one at least")
        self.left: dict[str, str] = {}
        self._layers = self._found()
        for layer in self._layers:
            if not settings.ridge and layer.rows < layer.width:
                raise SettingsError(
                    f"reconstruction of '{layer.name}' without ridge has {layer.rows:,} equations for {layer.width:,} "
                    "unknowns; give more reconstruction.examples or positions, or a reconstruction.ridge"
                )

    def __len__(self) -> int:
        return len(self._layers) * self._settings.sweeps

    def run(self, skip: int = 0, progress: Callable[[int, int], None] = lambda done, total: None) -> Iterator[LayerFit]:
        """Fit layer after layer; after each, the model holds all that was fitted so far.

        Args:
            skip: layers that an earlier, interrupted run has fitted; the model holds them.
            progress: called with (layers done, layers in all).

        Raises:
            CurvatureError: a regression cannot be solved.
        """
        limit = self._settings.cache_mebibytes << 20
        replays = {which: Replay(network, limit // 2) for which, network in self._networks.items()}
        pruned, dense = self._networks["pruned"], self._networks["dense"]
        with as_found(pruned), as_found(dense), replays["pruned"], replays["dense"]:
            for which, replay in replays.items():
                self._calls(which)
                replay.learn()
            for done in range(skip, len(self)):
                index = done % len(self._layers)
                if index == 0:  # from the first layer on, all will change once more
                    for replay in replays.values():
                        replay.forget()
                progress(done, len(self))
                yield self._fit(index, replays)
        progress(len(self), len(self))

    # -- what runs -----------------------------------------------------------------------------------------
    def _inputs(self) -> Iterator[tuple[Tensor, int]]:
        for inputs, _ in pairs(self._batches, next(self._networks["pruned"].parameters()).device):
            yield inputs, len(inputs)

    def _calls(self, which: str) -> tuple[list[Call], dict[Piece, Norm]]:
        """All calls of a pass over the first batch, and the normalisations that follow."""
        found: list[Call] = []
        norms: dict[Piece, Norm] = {}

        def seen(call: Call, compute: Callable[[], Tensor]) -> Tensor:
            found.append(call)
            return compute()

        mode = self._modes[which]
        mode.normed = lambda call, norm: norms.update({call.weight: norm})
        self._pass(which, next(self._inputs())[0], seen)
        mode.normed = lambda call, norm: None
        return found, norms

    def _pass(self, which: str, inputs: Tensor, seen: Seen) -> None:
        self._modes[which].seen = seen
        with torch.no_grad(), plain_attention(), self._modes[which]:
            self._networks[which](inputs)

    def _found(self) -> list[_Layer]:
        with as_found(self._networks["pruned"]), as_found(self._networks["dense"]):
            (calls, norms), (others, dense_norms) = self._calls("pruned"), self._calls("dense")
        if [call.weight for call in calls] != [call.weight for call in others]:
            raise ModelError("the pruned and the dense network use their weights in different orders")
        by_piece = {
            piece: list(uses)
            for piece, uses in groupby(sorted(calls, key=lambda c: c.weight), key=lambda call: call.weight)
        }
        order = list(dict.fromkeys(call.weight for call in calls))
        biased = Counter(bias for uses in by_piece.values() for bias in {call.bias for call in uses} if bias)
        examples, most = [count for _, count in self._inputs()], self._settings.positions
        layers = []
        for piece in order:
            uses, overlaps = by_piece[piece], [p for p in order if p != piece and _overlap(p, piece)]
            reason = None
            if overlaps:
                reason = "its rows are used both together and in parts"
            elif len({(call.groups, call.width) for call in uses}) > 1:
                reason = "its uses differ in groups"
            if reason is not None:
                self.left[piece.name] = reason
                continue
            bias = uses[0].bias if len({call.bias for call in uses}) == 1 else None
            bias = bias if bias is not None and biased[bias] == 1 else None  # one that is shared stays as it is
            followed = None
            if self._settings.norms and len(uses) == 1 and uses[0].bias is None and piece in norms:
                name = norms[piece].name
                if piece in dense_norms and sum(norm.name == name for norm in norms.values()) == 1:
                    followed = norms[piece], dense_norms[piece]
                    bias = Piece(name, 0, len(norms[piece].bias))
            rows = sum(call.rows(most, examples[0]) for call in uses) * sum(examples) // examples[0]
            width = uses[0].width + (bias is not None)
            layers.append(_Layer(piece, uses[0].groups, width, len(uses), bias, rows, followed))
        for name in self._space.names:
            if name not in {layer.name for layer in layers}:
                self.left.setdefault(name, "no linear map or convolution used it when the network ran")
        return layers

    # -- one layer -----------------------------------------------------------------------------------------
    @torch.no_grad()
    def _fit(self, index: int, replays: Mapping[str, Replay]) -> LayerFit:
        begun = time.perf_counter()
        layer = self._layers[index]
        fitted, held = _Moments(), _Moments()
        fitting = len(self._batches) - self._held
        for number, (inputs, examples) in enumerate(self._inputs()):
            generator = torch.Generator().manual_seed(((self._seed * 100_003) + index * 1009 + number) & (2**63 - 1))
            self._gather(layer, number, inputs, examples, generator, replays, fitted if number < fitting else held)
        W = self._read(layer)
        scale = None
        if layer.bias is not None:
            # The bias is the weight of a constant input of the size of the others, so that the ridge treats it alike.
            plain = fitted.means(None)[0].diagonal(dim1=1, dim2=2)[:, :-1]
            scale = float(plain.mean().sqrt()) or 1.0
            W = torch.cat([W[:, :, :-1], W[:, :, -1:] / scale], dim=2)
        B = self._weights_of_outputs(layer, W)
        A, C, Z = fitted.means(scale)
        unit = float(A.diagonal(dim1=1, dim2=2).mean())
        kept = self._kept(layer, W)
        gradient = W @ A - C
        gradient = gradient if B is None else B @ gradient
        iterations, residual, new = 0, 0.0, W
        if unit > 0 and bool(kept.any()):
            operator = self._operator(A, B, self._settings.ridge * unit, W.shape[1])
            try:
                minimum = operator.minimise(~kept.reshape(-1), torch.zeros_like(W).reshape(-1), gradient.reshape(-1))
            except CurvatureError as error:
                raise CurvatureError(
                    f"the reconstruction of '{layer.name}' cannot be solved; raise reconstruction.ridge "
                    f"({self._settings.ridge:g}) or give more reconstruction.examples ({error})"
                ) from error
            new = W + minimum.solution.view_as(W)
            iterations, residual = minimum.iterations, minimum.residual
        nan = float("nan")
        before, after = (_error(V, A, C, Z, B) for V in (W, new))
        held_out = [_error(V, *held.means(scale), B) if held.count else nan for V in (W, new)]
        self._write(layer, new, scale)
        return LayerFit(
            name=layer.name
            if _whole(layer.piece, self._space)
            else f"{layer.name}[{layer.piece.start}:{layer.piece.stop}]",
            error_before=before,
            error_after=after,
            held_out_before=held_out[0],
            held_out_after=held_out[1],
            iterations=iterations,
            residual=residual,
            seconds=time.perf_counter() - begun,
        )

    def _gather(
        self,
        layer: _Layer,
        number: int,
        inputs: Tensor,
        examples: int,
        generator: torch.Generator,
        replays: Mapping[str, Replay],
        moments: _Moments,
    ) -> None:
        """Inputs in the pruned and outputs in the dense network, at the same positions, into the moments."""
        places: list[Tensor | None] = []
        targets: list[Tensor] = []
        extents: list[torch.Size] = []

        def dense(call: Call, compute: Callable[[], Tensor]) -> Tensor:
            output = compute()
            if call.weight == layer.piece:
                replays["dense"].settled = False
                positions = call.positions(self._settings.positions, examples, generator)
                places.append(positions)
                extents.append(call.input.shape)
                targets.append(call.outputs(output.detach(), positions))
                if len(targets) == layer.calls:
                    raise _Reached
            return output

        count = 0

        def pruned(call: Call, compute: Callable[[], Tensor]) -> Tensor:
            nonlocal count
            if call.weight == layer.piece:
                replays["pruned"].settled = False
                if call.input.shape != extents[count]:
                    raise ModelError(f"the inputs of '{layer.name}' have another shape in the dense network")
                X, Z = call.inputs(places[count]), layer.target(targets[count], self._bias(layer.bias))
                offset = self._bias(call.bias)
                if layer.bias is not None:
                    X = torch.cat([X, X.new_ones(*X.shape[:2], 1)], dim=2)
                elif offset is not None:
                    Z = Z - offset.view(layer.groups, 1, -1)
                moments.add(X, Z)
                count += 1
                if count == layer.calls:
                    raise _Reached
            return compute()

        for which, seen in (("dense", dense), ("pruned", pruned)):
            replays[which].batch, replays[which].settled = number, True
            try:
                self._pass(which, inputs, seen)
            except _Reached:
                continue
            raise ModelError(
                f"'{layer.name}' was used {layer.calls} times for the first batch and less often for another; "
                "reconstruction needs a network that runs alike for all"
            )

    def _operator(self, A: Tensor, B: Tensor | None, ridge: float, outputs: int) -> LinearOperator:
        """(B ⊗ Â + λI)⁻¹ on the rows of a group after those of the one before."""
        if B is None and A.shape[1] <= DIRECT:
            damped = A + ridge * torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
            return RepeatedBlock(damped, outputs)
        inner, U = torch.linalg.eigh(A)
        outer, V = torch.ones(*A.shape[:1], outputs, dtype=A.dtype, device=A.device), None
        if B is not None:
            outer, V = torch.linalg.eigh(B)
        spectrum = outer.clamp_min(0)[:, :, None] * inner.clamp_min(0)[:, None, :] + ridge
        if not bool((spectrum > 0).all()):
            raise CurvatureError("the second moments of the inputs are singular")
        return KroneckerDiagonal([V, U], spectrum.reciprocal(), orthogonal=True)

    def _weights_of_outputs(self, layer: _Layer, W: Tensor) -> Tensor | None:
        """B, (g, out, out), its diagonal one in the mean; None for the identity."""
        B = self._weighting.get(layer.name)
        if B is None:
            return None
        # Given in groups of its own, such as a packed projection's three, of which the layer may see one.
        start, stop = layer.piece.start, layer.piece.stop
        whole, outputs = torch.block_diag(*B.to(W))[start:stop, start:stop], W.shape[1]
        B = torch.stack([whole[i : i + outputs, i : i + outputs] for i in range(0, stop - start, outputs)])
        unit = B.diagonal(dim1=1, dim2=2).mean()
        if not float(unit) > 0:
            return None
        eye = torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
        return (B / unit + OUTPUT_DAMPING * eye) / (1 + OUTPUT_DAMPING)

    # -- weights -------------------------------------------------------------------------------------------
    def _tensor(self, piece: Piece) -> Tensor:
        return self._networks["pruned"].get_parameter(piece.name).detach()[piece.start : piece.stop]

    def _bias(self, piece: Piece | None) -> Tensor | None:
        return None if piece is None else self._tensor(piece)

    def _read(self, layer: _Layer) -> Tensor:
        """(g, out, in), with the bias as a last column."""
        W = self._tensor(layer.piece).reshape(layer.groups, -1, layer.width - (layer.bias is not None)).double()
        if layer.bias is None:
            return W
        bias = self._tensor(layer.bias).double().view(layer.groups, -1, 1)
        return torch.cat([W, bias if layer.norms is None else torch.zeros_like(bias)], dim=2)

    def _kept(self, layer: _Layer, W: Tensor) -> Tensor:
        parts = [piece for piece in (layer.piece, layer.bias) if piece is not None]
        columns = []
        for piece in parts:
            if piece.name in self._space:
                info = self._space[piece.name]
                kept = self._mask.kept[info.slice].view(info.shape)[piece.start : piece.stop]
            else:
                kept = torch.ones_like(self._tensor(piece), dtype=torch.bool)
            columns.append(kept.reshape(layer.groups, W.shape[1], -1).to(W.device))
        return torch.cat(columns, dim=2)

    def _write(self, layer: _Layer, W: Tensor, scale: float | None) -> None:
        weight = self._tensor(layer.piece)
        inputs = layer.width - (layer.bias is not None)
        kept = self._kept(layer, W)
        clean = torch.where(kept, W, 0.0)
        weight.copy_(clean[:, :, :inputs].reshape(weight.shape))
        if layer.bias is not None and scale is not None:
            bias, fitted = self._tensor(layer.bias), (clean[:, :, -1] * scale).flatten()
            bias.copy_(fitted if layer.norms is None else bias + layer.norms[0].scale * fitted)


def output_moments(objective: Objective, generator: torch.Generator) -> dict[str, Tensor]:
    """E G_n G_nᵀ of the weights' gradient rows (see `gradient_rows`): name -> (groups, out/groups, out/groups).

    Of weights of two or more dimensions; as a weighting of outputs, those count more whose weights matter more.
    """
    totals: dict[str, Tensor] = {}
    for rows in gradient_rows(objective, generator=generator):
        for info in objective.space.parameters:
            if len(info.shape) > 1:
                G = rows[:, info.slice].reshape(len(rows), info.groups, info.shape[0] // info.groups, -1)
                moment = torch.einsum("bgoi,bgpi->gop", G, G).double()
                totals[info.name] = moment + totals[info.name] if info.name in totals else moment
    return totals


def _error(W: Tensor, A: Tensor, C: Tensor, Z: Tensor, B: Tensor | None) -> float:
    """E ‖W x̂ − z‖²_B / E ‖z‖²_B."""
    residual = W @ A @ W.mT - W @ C.mT - C @ W.mT + Z
    of, to = (part if B is None else B @ part for part in (residual, Z))
    whole = float(to.diagonal(dim1=1, dim2=2).sum())
    return max(float(of.diagonal(dim1=1, dim2=2).sum()), 0.0) / whole if whole > 0 else 0.0


def _overlap(one: Piece, other: Piece) -> bool:
    return one.name == other.name and one.start < other.stop and other.start < one.stop


def _whole(piece: Piece, space: ParameterSpace) -> bool:
    return piece.stop - piece.start == space[piece.name].shape[0]
