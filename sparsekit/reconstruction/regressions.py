"""The regressions, one for each weight that can be fitted, found by a pass over one batch of both networks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from sparsekit.errors import ModelError
from sparsekit.problem.parameters import ParameterSpace
from sparsekit.reconstruction.uses import Call, Norm, Piece


@dataclass
class Regression:
    """One regression: a weight, or rows of it, with all the calls that use them.

    `width` is the number of inputs of a row, plus one if a bias is fitted; `rows` is the number of equations.
    """

    piece: Piece
    groups: int
    width: int
    calls: int
    bias: Piece | None
    rows: int
    norms: tuple[Norm, Norm] | None = None  # the one after it, pruned and dense, if `bias` is its own
    after: tuple[Norm, Norm] | None = None  # the same, whosoever's the bias is

    def target(self, Z: Tensor, bias: Tensor | None) -> Tensor:
        """Targets (g, rows, out) that are, after the pruned network's normalisation, what Z is after the dense one's.

        Args:
            Z: outputs in the dense network.
            bias: of the normalisation in the pruned one, (out,), its present value.
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


def regressions(
    network: nn.Module,
    space: ParameterSpace,
    passes: Mapping[str, tuple[Sequence[Call], Mapping[Piece, Norm]]],
    others: Mapping[str, str],
    *,
    examples: int,
    fitted: int,
    positions: int | None,
    norms: bool,
) -> tuple[list[Regression], dict[str, str]]:
    """The regressions in the order in which their weights are first used, and why each other weight has none.

    Args:
        network: the pruned one.
        space: the prunable weights.
        passes: 'pruned' and 'dense' -> the calls of weights in a pass over the first batch, and the normalisations
            that follow them.
        others: name of a weight -> the function, neither a linear map nor a convolution, that uses it.
        examples: number in the first batch.
        fitted: number of fitted examples in all.
        positions: largest number of positions that are used of an example's output; None: all.
        norms: whether the bias of a normalisation that follows a layer without one is fitted.

    Raises:
        ModelError: the two networks do not use their weights in the same order.
    """
    (calls, following), (dense_calls, dense_following) = passes["pruned"], passes["dense"]
    if [call.weight for call in calls] != [call.weight for call in dense_calls]:
        raise ModelError("the pruned and the dense network use their weights in different orders")
    by_piece = {
        piece: list(uses)
        for piece, uses in groupby(sorted(calls, key=lambda call: call.weight), key=lambda call: call.weight)
    }
    order = list(dict.fromkeys(call.weight for call in calls))
    biased = Counter(bias for uses in by_piece.values() for bias in {call.bias for call in uses} if bias)
    found: list[Regression] = []
    left: dict[str, str] = {}
    for piece in order:
        uses = by_piece[piece]
        reason = _obstacle(piece, uses, order, others)
        if reason is not None:
            left[piece.name] = reason
            continue
        bias = uses[0].bias if len({call.bias for call in uses}) == 1 else None
        if bias is not None and (biased[bias] > 1 or not network.get_parameter(bias.name).requires_grad):
            bias = None  # shared or frozen: not fitted
        followed = _norm_after(piece, following, dense_following) if len(uses) == 1 else None
        fitted_norms = followed if norms and uses[0].bias is None else None
        if fitted_norms is not None:
            bias = Piece(fitted_norms[0].name, 0, len(fitted_norms[0].bias))
        rows = sum(call.rows(positions, examples) for call in uses) * fitted // examples
        width = uses[0].width + (bias is not None)
        found.append(Regression(piece, uses[0].groups, width, len(uses), bias, rows, fitted_norms, followed))
    covered = {layer.name for layer in found} | {layer.bias.name for layer in found if layer.bias is not None}
    for name in space.names:
        if name not in covered:
            left.setdefault(name, "no linear map or convolution used it when the network ran")
    return found, left


def _norm_after(
    piece: Piece, following: Mapping[Piece, Norm], dense_following: Mapping[Piece, Norm]
) -> tuple[Norm, Norm] | None:
    """The normalisation that follows a layer and no other, in the pruned and in the dense network."""
    if piece not in following or piece not in dense_following:
        return None
    several = sum(norm.name == following[piece].name for norm in following.values()) > 1
    return None if several else (following[piece], dense_following[piece])


def _obstacle(piece: Piece, uses: Sequence[Call], order: Sequence[Piece], others: Mapping[str, str]) -> str | None:
    """Why a weight cannot be fitted; None if it can."""
    if any(other != piece and _overlap(other, piece) for other in order):
        return "its rows are used both together and in parts"
    if piece.name in others:
        return f"it is used in another way too, by {others[piece.name]}"
    if len({(call.groups, call.width) for call in uses}) > 1:
        return "its uses differ in groups"
    return None


def _overlap(one: Piece, other: Piece) -> bool:
    return one.name == other.name and one.start < other.stop and other.start < one.stop
