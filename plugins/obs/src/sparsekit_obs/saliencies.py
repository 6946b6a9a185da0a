"""Scores that take account of what else is removed: greedy elimination, and groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import comb
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sparsekit import ParameterSpace, Saliency, ScoreContext, Settings, SettingsError, Units
from sparsekit.linalg import check_pivots, eliminate

#: Subsets of a group beyond which the cheapest is found greedily.
MOST_SUBSETS = 128

#: Bytes of blocks that are worked on at a time.
SLICE_BYTES = 1 << 28


class GreedySettings(Settings):
    """Settings of `obs-greedy`."""

    block_size: int = Field(50, ge=1, description="most weights among which elimination is greedy, inside a block of Σ")


class GreedySurgeon(Saliency):
    """Costs of the weights of each block in the order in which greedy Optimal Brain Surgeon removes them.

    In each block: remove the weight of least w_i²/(2Σ_ii), move the others, eliminate it from Σ
    (Σ ← Σ − Σ_{:i}Σ_{i:}/Σ_ii), and so on to the last. A weight's score is what its removal cost when it was
    taken, raised above the score of the one before where it is not, so that one threshold over all blocks takes
    from each a beginning of its order. Blocks then compete by true marginal costs, which single-weight scores
    underrate.

    Blocks are pieces of at most `block_size` of the stretches that Σ does not couple; for a dense Σ, what is outside
    of a piece moves freely.

    Reference: Kuznedelev et al., 2023 (CAP); Frantar and Alistarh, 2022 (ExactOBS, per row).
    """

    name: ClassVar[str] = "obs-greedy"
    Settings: ClassVar[type[Settings]] = GreedySettings

    def score(self, context: ScoreContext) -> Tensor:
        """(n,) marginal costs in units of the loss, float64 so that the order of equals is kept."""
        operator, kept = context.inverse.conditioned(context.mask), context.mask.kept
        scores = torch.zeros_like(context.weights, dtype=torch.float64)
        for index in _pieces(operator.stretches(), self.settings.block_size, context.weights.device):
            scores[index] = eliminate(operator.blocks(index).double(), context.weights[index].double(), kept[index])
        return scores


def _pieces(stretches: Sequence[int], longest: int, device: torch.device) -> Iterator[Tensor]:
    """Coordinates of the stretches, cut where longer than `longest`, in batches (m, B) of one length."""
    by_length: dict[int, list[int]] = {}
    start = 0
    for length in stretches:
        for first in range(0, length, longest):
            by_length.setdefault(min(longest, length - first), []).append(start + first)
        start += length
    for length, starts in by_length.items():
        for some in torch.tensor(starts, device=device).split(max(1, SLICE_BYTES // (length * length * 8 * 3))):
            yield some[:, None] + torch.arange(length, device=device)


class GroupSurgeon(Saliency):
    """Scores for patterns that decide on groups: ½ w_Tᵀ (Σ_TT)⁻¹ w_T, the cost of a set T while the others move.

    For N:M each group's cheapest subset T of M − N weights is found among all of them (6 for 2:4), or greedily
    where they are more than 128; for blocks T is the whole group. The members of T share its cost equally, so that
    sums over a group are costs; the other weights come after every T.

    Reference: Kurtic et al., 2022 (oBERT, blocks of 4); Hassibi and Stork, 1993.
    """

    name: ClassVar[str] = "obs-group"
    of_groups: ClassVar[bool] = True
    conformance: ClassVar[Mapping[str, object]] = {"units": lambda space: neighbours(space, 4)}  # of the kit

    def score(self, context: ScoreContext) -> Tensor:
        """(n,) shares of the groups' costs, in units of the loss.

        Raises:
            SettingsError: the pattern decides on weights one by one.
        """
        units = context.units
        if units is None:
            raise SettingsError("the saliency 'obs-group' scores groups; use it with --pattern n:m or block")
        operator, weights, kept = context.inverse.conditioned(context.mask), context.weights, context.mask.kept
        scores = torch.full_like(weights, torch.finfo(weights.dtype).max)
        for index in units.index.to(weights.device).split(max(1, SLICE_BYTES // (units.index.shape[1] ** 2 * 8 * 8))):
            sigma = operator.blocks(index).double()
            cost, members = cheapest(sigma, weights[index].double(), kept[index], units.removed)
            scores[index.gather(1, members)] = (cost[:, None] / units.removed).expand(members.shape).to(scores.dtype)
        return torch.where(kept, scores, 0.0)


def neighbours(space: ParameterSpace, size: int) -> Units:
    """Groups of `size` neighbours in memory, whole ones of each tensor, all of which go together."""
    whole = [torch.arange(info.start, info.start + info.size // size * size) for info in space.parameters]
    return Units(torch.cat(whole).view(-1, size), size)


def cheapest(sigma: Tensor, weights: Tensor, kept: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The subset of `count` weights of each group whose removal costs least; it includes those already removed.

    Args:
        sigma: (m, B, B), Σ in each group, float64.
        weights: (m, B), zero where they are gone.
        kept: (m, B) bool; at most `count` of a group are gone.
        count: of weights to remove, those that are gone included.

    Returns:
        Costs (m,) and members (m, count).
    """
    width = weights.shape[1]
    if comb(width, count) > MOST_SUBSETS:
        order = torch.where(kept, eliminate(sigma.clone(), weights, kept), -1.0).argsort(dim=1, stable=True)
        return _cost(sigma, weights, order[:, :count]), order[:, :count]
    best = torch.full_like(weights[:, 0], torch.inf)
    members = torch.zeros(len(weights), count, dtype=torch.long, device=weights.device)
    for subset in combinations(range(width), count):
        T = torch.tensor(subset, device=weights.device).expand(len(weights), count)
        holds_all_gone = (~kept).sum(1) == (~kept).gather(1, T).sum(1)
        cost = torch.where(holds_all_gone, _cost(sigma, weights, T), torch.inf)
        better = cost < best
        best, members = torch.where(better, cost, best), torch.where(better[:, None], T, members)
    return best, members


def _cost(sigma: Tensor, weights: Tensor, members: Tensor) -> Tensor:
    w = weights.gather(1, members)
    block = torch.arange(len(sigma), device=sigma.device)[:, None, None]
    inner = sigma[block, members[:, :, None], members[:, None, :]]
    factor, failed = torch.linalg.cholesky_ex(inner)
    pivots = factor.diagonal(dim1=1, dim2=2).amin(1)
    check_pivots(torch.where(failed == 0, pivots, -1.0))
    return 0.5 * torch.linalg.solve_triangular(factor, w[:, :, None], upper=False).square().sum((1, 2))
