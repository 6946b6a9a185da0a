"""Scores that know that weights go together: greedy elimination, and groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import comb
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sparsekit import CurvatureError, Saliency, ScoreContext, Settings, SettingsError

#: Subsets of a group beyond which the cheapest is found greedily.
MOST_SUBSETS = 128

#: Bytes of blocks that are worked on at a time.
SLICE_BYTES = 1 << 28

#: Weights taken before the rest of a block is updated: by then in one matrix product, not in as many passes over it.
PANEL = 32


class GreedySettings(Settings):
    """Settings of `obs-greedy`."""

    block_size: int = Field(50, ge=1, description="most weights among which elimination is greedy, inside a block of Σ")


class GreedySurgeon(Saliency):
    """The order in which greedy Optimal Brain Surgeon would remove the weights of each block, and at what cost.

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


def eliminate(sigma: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """Greedy Optimal Brain Surgeon in every block at once: a Cholesky factorisation of Σ, pivoted by cost.

    Args:
        sigma: (m, B, B), Σ in each block, float64.
        weights: (m, B), zero where they are gone.
        kept: (m, B) bool; those that are gone are eliminated first, at no cost.

    Returns:
        (m, B): the cost ½ w_i²/Σ_ii of each weight when it was taken, increasing in the order of the taking.

    Raises:
        CurvatureError: a pivot Σ_ii is not positive when its weight is taken.
    """
    weights = weights.clone()
    costs, left = torch.zeros_like(weights), torch.ones_like(kept)
    reached, no_bound = torch.zeros_like(weights[:, 0]), weights.new_tensor(torch.inf)
    block, count = torch.arange(len(sigma), device=sigma.device), weights.shape[1]
    place = torch.arange(count, device=sigma.device).expand(len(sigma), -1)  # where what is worked on came from
    smallest = torch.ones_like(reached)
    for first in range(0, count, PANEL):
        panel = min(PANEL, count - first)
        diagonal = sigma.diagonal(dim1=1, dim2=2).clone()
        factor = sigma.new_empty(len(sigma), panel, weights.shape[1])  # Σ now is `sigma` − factorᵀ factor
        for k in range(panel):
            cost = weights.square() / (2 * diagonal)
            cost = torch.where(left, torch.where(kept, cost, -1.0), torch.inf)
            least, i = cost.min(1)
            reached = torch.maximum(torch.nextafter(reached, no_bound), least)  # a later one never before an earlier
            costs[block, place[block, i]] = reached
            row, known = sigma[block, i][:, None], factor[:, :k]
            row = torch.baddbmm(row, known[block, :, i][:, None], known, alpha=-1)[:, 0]
            pivot = row[block, i]
            # NaN stays; where no cost is finite, what is taken already would be taken again
            least_pivot = torch.where(left[block, i], torch.minimum(pivot, diagonal[block, i]), -1.0)
            smallest = torch.minimum(smallest, least_pivot)
            weights -= (weights[block, i] / pivot)[:, None] * row
            factor[:, k] = row * pivot.rsqrt()[:, None]
            diagonal -= factor[:, k].square()
            left[block, i] = False
            diagonal[block, i] = 1.0  # what is taken must not divide by zero
        _check_pivots(smallest)
        if first + panel < count:  # as many of each block are left: the rest is worked on by itself
            rest = left.nonzero()[:, 1].view(len(left), -1)
            factor = factor.gather(2, rest[:, None].expand(-1, panel, -1))
            sigma = sigma[block[:, None, None], rest[:, :, None], rest[:, None, :]]
            sigma.baddbmm_(factor.mT, factor, alpha=-1)
            weights, kept, left, place = (x.gather(1, rest) for x in (weights, kept, left, place))
    return costs


class GroupSurgeon(Saliency):
    """Scores for patterns that decide on groups: ½ w_Tᵀ (Σ_TT)⁻¹ w_T, the cost of a set T while the others move.

    For N:M each group's cheapest subset T of M − N weights is found among all of them (6 for 2:4), or greedily
    where they are more than 128; for blocks T is the whole group. The members of T share its cost equally, so that
    sums over a group are costs; the other weights come after every T.

    Reference: Kurtic et al., 2022 (oBERT, blocks of 4); Hassibi and Stork, 1993.
    """

    name: ClassVar[str] = "obs-group"
    of_groups: ClassVar[bool] = True

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


def cheapest(sigma: Tensor, weights: Tensor, kept: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The subset of `count` weights of each group whose removal costs least; what is gone belongs to it.

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
        order = torch.where(kept, eliminate(sigma, weights, kept), -1.0).argsort(dim=1, stable=True)
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
    _check_pivots(torch.where(failed == 0, pivots, -1.0))
    return 0.5 * torch.linalg.solve_triangular(factor, w[:, :, None], upper=False).square().sum((1, 2))


def _check_pivots(smallest: Tensor) -> None:
    """Refuse blocks (m,) whose smallest pivot is not positive: a cost divided by it would rank first, or be NaN."""
    if not bool((smallest > 0).all()):
        raise CurvatureError(
            f"{int((~(smallest > 0)).sum())} of {len(smallest)} blocks of the inverse Fisher are not positive definite "
            "when their weights are removed one after another; raise the damping"
        )
