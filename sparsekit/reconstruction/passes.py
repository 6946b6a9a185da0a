"""Passes over the pruned and the dense network: the uses of their weights, and a layer's inputs and targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from sparsekit.curvature.attention import plain_attention
from sparsekit.errors import ModelError
from sparsekit.problem.objective import Batch, as_found, pairs
from sparsekit.problem.parameters import ParameterSpace
from sparsekit.reconstruction.activations import Replay
from sparsekit.reconstruction.moments import Moments
from sparsekit.reconstruction.regressions import Regression
from sparsekit.reconstruction.uses import Call, Norm, Piece, Seen, WeightCalls


class _Reached(Exception):
    """The layer's last call was reached; the rest of the pass is not needed."""


class Passes:
    """Passes over both networks; while it is entered, outputs of final layers are cached and the networks unchanged.

    Attributes:
        others: name of a weight -> the function, neither a linear map nor a convolution, that uses it in the pruned
            network; known after `calls`.

    Args:
        pruned, dense: of the same architecture.
        space: the prunable weights.
        batches: examples, inputs first; the same at each iteration, see `pairs`.
        positions: largest number of positions that are used of an example's output; None: all.
        cache: largest number of bytes of cached activations.
    """

    def __init__(
        self,
        pruned: nn.Module,
        dense: nn.Module,
        space: ParameterSpace,
        batches: Sequence[Batch],
        *,
        positions: int | None,
        cache: int,
    ) -> None:
        self._networks = {"pruned": pruned, "dense": dense}
        self._modes = {which: WeightCalls(network, space) for which, network in self._networks.items()}
        self._replays = {which: Replay(network, cache // 2) for which, network in self._networks.items()}
        self._batches, self._positions = batches, positions
        self._entered = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for network in self._networks.values():
                stack.enter_context(as_found(network))
            for replay in self._replays.values():
                stack.enter_context(replay)
            self._entered = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._entered.__exit__(kind, error, tb)

    @property
    def others(self) -> dict[str, str]:
        return self._modes["pruned"].others

    def forget(self) -> None:
        """Empty the caches, because layers from the first on will change again."""
        for replay in self._replays.values():
            replay.forget()

    def rest(self) -> None:
        """End the pass: modules compute when they are called from elsewhere."""
        for replay in self._replays.values():
            replay.batch = None

    def inputs(self) -> Iterator[Tensor]:
        """The inputs of each batch, on the networks' device."""
        device = next(self._networks["pruned"].parameters()).device
        return (inputs for inputs, _ in pairs(self._batches, device))

    def calls(self, which: str) -> tuple[list[Call], dict[Piece, Norm]]:
        """All calls of weights in a pass of one network over the first batch, and the normalisations after them."""
        found: list[Call] = []
        norms: dict[Piece, Norm] = {}

        def seen(call: Call, compute: Callable[[], Tensor]) -> Tensor:
            found.append(call)
            return compute()

        mode = self._modes[which]
        mode.normed = lambda call, norm: norms.update({call.weight: norm})
        self._pass(which, next(self.inputs()), seen)
        mode.normed = lambda call, norm: None
        return found, norms

    def _pass(self, which: str, inputs: Tensor, seen: Seen) -> None:
        mode = self._modes[which]
        plain, mode.seen = mode.seen, seen
        try:
            with torch.no_grad(), plain_attention(), mode:
                self._networks[which](inputs)
        finally:
            mode.seen = plain  # `seen` refers to the tensors of the pass

    def distrust(self, layer: Regression) -> None:
        """Turn the cache off where modules have side effects: where cached and computed passes of a batch differ.

        Both networks have the same modules, so only the pruned one is checked.
        """
        replay = self._replays["pruned"]
        if not replay.limit:
            return
        inputs = next(self.inputs())
        computed, replayed = (self._uses(layer, inputs, replay, batch) for batch in (None, 0))
        same = [a.shape == b.shape and _close(a, b) for a, b in zip(computed, replayed, strict=False)]
        if len(computed) != len(replayed) or not all(same):
            for each in self._replays.values():
                each.limit = 0
                each.forget()

    def _uses(self, layer: Regression, inputs: Tensor, replay: Replay, batch: int | None) -> list[Tensor]:
        """The layer's inputs in a pass of the pruned network up to its last use."""
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

    def gather(
        self,
        layer: Regression,
        number: int,
        inputs: Tensor,
        generator: torch.Generator,
        bias: Tensor | None,
        moments: Moments,
    ) -> None:
        """Add a layer's inputs in the pruned and outputs in the dense network, at the same positions, to its moments.

        Args:
            layer: the regression.
            number: of the batch.
            inputs: the batch's.
            generator: draws the positions.
            bias: the present value of the bias that is fitted with the layer.
            moments: of the layer.

        Raises:
            ModelError: the two networks do not use the layer alike.
        """
        places: list[Tensor | None] = []
        targets: list[Tensor] = []
        extents: list[torch.Size] = []

        def dense(call: Call, compute: Callable[[], Tensor]) -> Tensor:
            output = compute()
            if call.weight == layer.piece:
                self._replays["dense"].settled = False
                positions = call.positions(self._positions, len(inputs), generator)
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
                self._replays["pruned"].settled = False
                if call.input.shape != extents[count]:
                    raise ModelError("its inputs have another shape in the dense network, for an example at least")
                moments.add(*_with_bias(layer, call, call.inputs(places[count]), layer.target(targets[count], bias)))
                count += 1
                if count == layer.calls:
                    raise _Reached
            return compute()

        for which, seen in (("dense", dense), ("pruned", pruned)):
            self._replays[which].begin(number)
            try:
                self._pass(which, inputs, seen)
            except _Reached:
                continue
            raise ModelError(f"it was used {layer.calls} times for the first batch and less often for another")


def _with_bias(layer: Regression, call: Call, X: Tensor, Z: Tensor) -> tuple[Tensor, Tensor]:
    """(inputs, targets) where the bias is one more weight, of the constant input 1, or is not fitted."""
    if layer.bias is not None:
        X = torch.cat([X, X.new_ones(*X.shape[:2], 1)], dim=2)
    elif call.offset is not None:
        Z = Z - call.offset.reshape(layer.groups, 1, -1)
    return X, Z


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to the order of summation on an accelerator."""
    return bool((a - b).norm() <= 1e-3 * a.norm()) if a.is_floating_point() else torch.equal(a, b)
