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
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from sparsekit.curvature.attention import plain_attention
from sparsekit.curvature.rows import gradient_rows
from sparsekit.curvature.vectors import FisherKind
from sparsekit.errors import CurvatureError, DataError, ModelError, SettingsError
from sparsekit.linalg import KroneckerDiagonal, LinearOperator, RepeatedBlock
from sparsekit.methods.interfaces import ReconstructionSettings
from sparsekit.problem.objective import Batch, Objective, as_found, pairs
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.reconstruction.activations import Replay
from sparsekit.reconstruction.uses import Call, Norm, Piece, Seen, WeightCalls

#: Inputs of a row up to which its own system is factorised; beyond, all rows are solved by conjugate gradients.
DIRECT = 1024

#: Half the inputs of a product XᵀX from which on it is taken by halves.
SMALLEST_GRAM = 96

#: Added to an output weighting B, relative to the mean of its diagonal: outputs that B forgets keep a say.
OUTPUT_DAMPING = 1.0


@dataclass(frozen=True)
class LayerFit:
    """How one layer was fitted.

    Attributes:
        name: of the weight; with its rows where only some of them were fitted at a time.
        error_before, error_after: E ‖W x̂ − W⁰x‖²_B / E ‖W⁰x‖²_B on the examples that were fitted.
        held_out_before, held_out_after: the same on examples that were not; NaN without any.
        iterations: of conjugate gradients; 0 where the solve was direct.
        residual: of the normal equations, relative to their right side.
        seconds: for the layer, passes included.
        left: why it stays as it was, and has no errors; empty where it was fitted.
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

    @property
    def memory(self) -> int:
        """Bytes of its statistics, fitted and held out, and of their decomposition."""
        outputs = (self.piece.stop - self.piece.start) // self.groups
        return 8 * self.groups * (6 * self.width**2 + 6 * outputs * self.width)


class _Moments:
    """Â = E x̂x̂ᵀ, C = E z x̂ᵀ and E zᵀBz over rows, by group, in float64; products are taken in float32 at least."""

    def __init__(self, B: Tensor | None) -> None:
        self.count = 0
        self._B = B
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, X: Tensor, Z: Tensor) -> None:
        """Inputs (g, rows, in) and targets (g, rows, out)."""
        with torch.autocast(X.device.type, enabled=False):
            X, Z = (part if part.dtype == torch.float64 else part.float() for part in (X, Z))
            weighted = Z if self._B is None else Z @ self._B.to(Z)
            found = _gram(X).double(), (Z.mT @ X).double(), (weighted * Z).sum(dtype=torch.float64)
        if self._sums is None:
            self._sums = found
        else:
            A, C, length = self._sums
            self._sums = A + found[0], C + found[1], length + found[2]
        self.count += X.shape[1]

    def means(self, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """(Â, C, E zᵀBz), the last input, a constant one, multiplied by `scale`, where there is one."""
        assert self._sums is not None
        A, C, length = (total / self.count for total in self._sums)
        if scale is not None:
            A[:, -1] *= scale
            A[:, :, -1] *= scale
            C[:, :, -1] *= scale
        return A, C, length

    def error(self, W: Tensor, scale: float | None) -> float:
        """E ‖W x̂ − z‖²_B / E ‖z‖²_B; NaN without any rows."""
        if not self.count:
            return float("nan")
        A, C, length = self.means(scale)
        part = W @ A - 2 * C
        part = part if self._B is None else self._B @ part
        return max(float((part * W).sum() + length), 0.0) / float(length) if float(length) > 0 else 0.0


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
        self._held = min(len(batches) - 1, round(settings.held_out * len(batches)))
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

    @classmethod
    def check(
        cls,
        model: nn.Module,
        space: ParameterSpace,
        batches: Sequence[Batch],
        settings: ReconstructionSettings,
        available: int,
    ) -> None:
        """Refuse what cannot work, by one pass over a batch, before the model is changed.

        Args:
            model: before any cut.
            space: the prunable weights.
            batches: as many as there will be.
            settings: how.
            available: bytes that can be allocated where the model is.

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
        """Fit layer after layer; after each, the model holds all that was fitted so far.

        A layer that cannot be fitted stays as it was, and its `LayerFit.left` says why.

        Args:
            skip: layers that an earlier, interrupted run has fitted; the model holds them.
            progress: called with (layers done, layers in all).
        """
        limit = self._settings.cache_mebibytes << 20
        replays = {which: Replay(network, limit // 2) for which, network in self._networks.items()}
        pruned, dense = self._networks["pruned"], self._networks["dense"]
        with as_found(pruned), as_found(dense), replays["pruned"], replays["dense"]:
            for done in range(skip, len(self)):
                index = done % len(self._layers)
                if index == 0:  # from the first layer on, all will change once more
                    for replay in replays.values():
                        replay.forget()
                progress(done, len(self))
                yield self._fit(index, replays)
        progress(len(self), len(self))

    # -- what runs -----------------------------------------------------------------------------------------
    def _inputs(self) -> Iterator[Tensor]:
        device = next(self._networks["pruned"].parameters()).device
        return (inputs for inputs, _ in pairs(self._batches, device))

    def _calls(self, which: str) -> tuple[list[Call], dict[Piece, Norm]]:
        """All calls of a pass over the first batch, and the normalisations that follow."""
        found: list[Call] = []
        norms: dict[Piece, Norm] = {}

        def seen(call: Call, compute: Callable[[], Tensor]) -> Tensor:
            found.append(call)
            return compute()

        mode = self._modes[which]
        mode.normed = lambda call, norm: norms.update({call.weight: norm})
        self._pass(which, next(self._inputs()), seen)
        mode.normed = lambda call, norm: None
        return found, norms

    def _pass(self, which: str, inputs: Tensor, seen: Seen) -> None:
        mode = self._modes[which]
        plain, mode.seen = mode.seen, seen
        try:
            with torch.no_grad(), plain_attention(), mode:
                self._networks[which](inputs)
        finally:
            mode.seen = plain  # it holds what was seen

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
        examples, most = [len(inputs) for inputs, _ in self._batches], self._settings.positions
        fitted = sum(examples[: len(examples) - self._held])
        network, foreign = self._networks["pruned"], self._modes["pruned"].others
        layers = []
        for piece in order:
            uses, overlaps = by_piece[piece], [p for p in order if p != piece and _overlap(p, piece)]
            reason = None
            if overlaps:
                reason = "its rows are used both together and in parts"
            elif piece.name in foreign:
                reason = f"it is used in another way too, by {foreign[piece.name]}"
            elif len({(call.groups, call.width) for call in uses}) > 1:
                reason = "its uses differ in groups"
            if reason is not None:
                self.left[piece.name] = reason
                continue
            bias = uses[0].bias if len({call.bias for call in uses}) == 1 else None
            if bias is not None and (biased[bias] > 1 or not network.get_parameter(bias.name).requires_grad):
                bias = None  # shared, or frozen: it stays as it is
            followed = None
            if self._settings.norms and len(uses) == 1 and uses[0].bias is None and piece in norms:
                name = norms[piece].name
                if piece in dense_norms and sum(norm.name == name for norm in norms.values()) == 1:
                    followed = norms[piece], dense_norms[piece]
                    bias = Piece(name, 0, len(norms[piece].bias))
            rows = sum(call.rows(most, examples[0]) for call in uses) * fitted // examples[0]
            width = uses[0].width + (bias is not None)
            layers.append(_Layer(piece, uses[0].groups, width, len(uses), bias, rows, followed))
        covered = {layer.name for layer in layers} | {layer.bias.name for layer in layers if layer.bias is not None}
        for name in self._space.names:
            if name not in covered:
                self.left.setdefault(name, "no linear map or convolution used it when the network ran")
        return layers

    # -- one layer -----------------------------------------------------------------------------------------
    @torch.no_grad()
    def _fit(self, index: int, replays: Mapping[str, Replay]) -> LayerFit:
        begun, layer, nan = time.perf_counter(), self._layers[index], float("nan")
        name = layer.name
        if not _whole(layer.piece, self._space):
            name += f"[{layer.piece.start}:{layer.piece.stop}]"
        W = self._read(layer)
        B = self._weights_of_outputs(layer, W)
        fitted, held = _Moments(B), _Moments(B)
        try:
            self._distrust(layer, replays)
            for number, inputs in enumerate(self._inputs()):
                generator = torch.Generator().manual_seed((self._seed * 100_003 + index * 1009 + number) % 2**63)
                moments = fitted if number < len(self._batches) - self._held else held
                self._gather(layer, number, inputs, generator, replays, moments)
            new, scale, iterations, residual = self._solve(layer, W, B, fitted)
        except (CurvatureError, ModelError) as error:
            return LayerFit(name, nan, nan, nan, nan, 0, nan, time.perf_counter() - begun, str(error))
        finally:
            for replay in replays.values():
                replay.batch = None
        before = W if scale is None else torch.cat([W[:, :, :-1], W[:, :, -1:] / scale], dim=2)
        errors = [moments.error(V, scale) for moments in (fitted, held) for V in (before, new)]
        self._write(layer, new, scale)
        seconds = time.perf_counter() - begun
        return LayerFit(name, errors[0], errors[1], errors[2], errors[3], iterations, residual, seconds)

    def _solve(
        self, layer: _Layer, W: Tensor, B: Tensor | None, moments: _Moments
    ) -> tuple[Tensor, float | None, int, float]:
        """The fitted weights, the scale of their last input where that is the bias's, iterations and residual."""
        scale = None
        if layer.bias is not None:
            # The bias is the weight of a constant input of the size of the others, so that the ridge treats it alike.
            plain = moments.means(None)[0].diagonal(dim1=1, dim2=2)[:, :-1]
            scale = float(plain.mean().sqrt()) or 1.0
            W = torch.cat([W[:, :, :-1], W[:, :, -1:] / scale], dim=2)
        A, C, _ = moments.means(scale)
        diagonal = A.diagonal(dim1=1, dim2=2)
        free = self._kept(layer, W) & (diagonal > 0)[:, None]  # of inputs that are always zero nothing is known
        if not bool(free.any()):
            return W, scale, 0, 0.0
        gradient = W @ A - C
        gradient = gradient if B is None else B @ gradient
        # without a ridge, the rounding of the products
        ridge = max(self._settings.ridge, torch.finfo(self._tensor(layer.piece).dtype).eps) * float(diagonal.mean())
        operator = self._operator(A, B, ridge, W.shape[1])
        try:
            minimum = operator.minimise(~free.flatten(), torch.zeros_like(W).flatten(), gradient.flatten())
        except CurvatureError:
            raise CurvatureError(
                f"its regression cannot be solved; raise reconstruction.ridge from {self._settings.ridge:g}, or give "
                "more reconstruction.examples"
            ) from None
        left = (gradient.flatten() + operator.solve(minimum.solution))[free.flatten()]
        right = float(gradient[free].norm())
        residual = float(left.norm()) / right if right > 0 else 0.0
        return W + minimum.solution.view_as(W), scale, minimum.iterations, residual

    def _distrust(self, layer: _Layer, replays: Mapping[str, Replay]) -> None:
        """Keep nothing more where modules do more than return something, as the first batch shows.

        Both networks have the same modules, so that one of them is looked at.
        """
        replay = replays["pruned"]
        if not replay.limit:
            return
        inputs = next(self._inputs())
        computed, replayed = (self._uses(layer, inputs, replay, batch) for batch in (None, 0))
        same = [a.shape == b.shape and _close(a, b) for a, b in zip(computed, replayed, strict=False)]
        if len(computed) != len(replayed) or not all(same):
            for each in replays.values():
                each.limit = 0
                each.forget()

    def _uses(self, layer: _Layer, inputs: Tensor, replay: Replay, batch: int | None) -> list[Tensor]:
        """What the layer is given in a pass of the pruned network up to its last use."""
        found: list[Tensor] = []

        def seen(call: Call, compute: Callable[[], Tensor]) -> Tensor:
            if call.weight == layer.piece:
                replay.settled = False
                found.append(call.input.clone())
                if len(found) == layer.calls:
                    raise _Reached
            return compute()

        replay.begin(batch)
        with suppress(_Reached):
            self._pass("pruned", inputs, seen)
        return found

    def _gather(
        self,
        layer: _Layer,
        number: int,
        inputs: Tensor,
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
                positions = call.positions(self._settings.positions, len(inputs), generator)
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
                    raise ModelError("its inputs have another shape in the dense network, for an example at least")
                X, Z = call.inputs(places[count]), layer.target(targets[count], self._bias(layer.bias))
                if layer.bias is not None:
                    X = torch.cat([X, X.new_ones(*X.shape[:2], 1)], dim=2)
                elif call.offset is not None:
                    Z = Z - call.offset.reshape(layer.groups, 1, -1)
                moments.add(X, Z)
                count += 1
                if count == layer.calls:
                    raise _Reached
            return compute()

        for which, seen in (("dense", dense), ("pruned", pruned)):
            replays[which].begin(number)
            try:
                self._pass(which, inputs, seen)
            except _Reached:
                continue
            raise ModelError(f"it was used {layer.calls} times for the first batch and less often for another")

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


def output_moments(objective: Objective, fisher: FisherKind, generator: torch.Generator) -> dict[str, Tensor]:
    """E G_n G_nᵀ of the weights' gradient rows (see `gradient_rows`): name -> (groups, out/groups, out/groups).

    Of weights of two or more dimensions; as a weighting of outputs, those count more whose weights matter more.
    """
    totals: dict[str, Tensor] = {}
    for rows in gradient_rows(objective, fisher, generator=generator):
        for info in objective.space.parameters:
            if len(info.shape) > 1:
                G = rows[:, info.slice].reshape(len(rows), info.groups, info.shape[0] // info.groups, -1)
                moment = torch.einsum("bgoi,bgpi->gop", G, G).double()
                totals[info.name] = moment + totals[info.name] if info.name in totals else moment
    return totals


def _gram(X: Tensor) -> Tensor:
    """XᵀX by group, its blocks below the diagonal copied from above: up to half of the multiplications."""
    half = X.shape[-1] // 2
    if half < SMALLEST_GRAM:
        return X.mT @ X
    left, right = X[:, :, :half], X[:, :, half:]
    across = left.mT @ right
    return torch.cat([torch.cat([_gram(left), across], 2), torch.cat([across.mT, _gram(right)], 2)], 1)


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for the order in which an accelerator adds up."""
    return bool((a - b).norm() <= 1e-3 * a.norm()) if a.is_floating_point() else torch.equal(a, b)


def _overlap(one: Piece, other: Piece) -> bool:
    return one.name == other.name and one.start < other.stop and other.start < one.stop


def _whole(piece: Piece, space: ParameterSpace) -> bool:
    return piece.stop - piece.start == space[piece.name].shape[0]
