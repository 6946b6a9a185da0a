"""Greedy Optimal Brain Surgeon in many blocks at once: Cholesky factorisations of Σ, pivoted by cost."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekit.errors import CurvatureError

#: Weights eliminated before the rest of a block is updated: in one matrix product, not in one pass for each weight.
PANEL = 64

#: Once at most this fraction of a block is left, it is copied without the rest; a copy costs several updates.
CROWDED = 0.6


def eliminate(sigma: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """The cost of each weight in greedy elimination: remove the cheapest, move the others, update Σ, repeat.

    Costs are ½ w_i²/Σ_ii; then w ← w − Σ_{:i} w_i/Σ_ii and Σ ← Σ − Σ_{:i}Σ_{i:}/Σ_ii. A cost below the previous one
    is raised to just above it, so that one threshold selects in each block the weights that were eliminated first.

    Args:
        sigma: (m, B, B), Σ in each block; it is overwritten.
        weights: (m, B), of the same type, zero where removed.
        kept: (m, B) bool; removed weights are eliminated first, at no cost.

    Returns:
        (m, B): the costs, increasing in the order of elimination.

    Raises:
        CurvatureError: a pivot Σ_ii is not positive when its weight is eliminated.

    Reference: Frantar and Alistarh, 2022 (ExactOBS); Kuznedelev et al., 2023 (CAP).
    """
    count, block = weights.shape[1], torch.arange(len(weights), device=weights.device)
    costs, weights, kept = torch.zeros_like(weights), weights.clone(), kept.clone()
    sigma = sigma.contiguous()
    place = torch.arange(count, device=weights.device).expand(len(weights), -1)  # original position of each column
    left = torch.ones_like(kept)
    reached, smallest = torch.zeros_like(costs[:, 0]), torch.ones_like(costs[:, 0])
    no_bound = costs.new_tensor(torch.inf)
    for first in range(0, count, PANEL):
        panel, width = min(PANEL, count - first), weights.shape[1]
        diagonal = sigma.diagonal(dim1=1, dim2=2).masked_fill(~left, 1.0)
        factor = sigma.new_empty(len(sigma), panel, width)  # Σ now is `sigma` − factorᵀ factor
        some_gone = not bool(kept.all())
        for k in range(panel):
            cost = (weights * weights).div_(diagonal)
            if some_gone:
                cost.masked_fill_(~kept, -1.0)
            least, i = cost.min(1)
            reached = torch.maximum(torch.nextafter(reached, no_bound), least / 2)  # costs increase strictly
            costs[block, place[block, i]] = reached
            row, known = sigma[block, i], factor[:, :k]
            if k:
                row = torch.baddbmm(row[:, None], known[block, :, i][:, None], known, alpha=-1)[:, 0]
            pivot = row[block, i]
            # NaN stays; where no cost is finite, the minimum is at a weight that is already eliminated
            smallest = torch.minimum(smallest, torch.where(least < torch.inf, pivot.minimum(diagonal[block, i]), -1.0))
            weights.addcmul_(row, (weights[block, i] / pivot)[:, None], value=-1)
            torch.mul(row, pivot.rsqrt()[:, None], out=factor[:, k])
            diagonal.addcmul_(factor[:, k], factor[:, k], value=-1)
            weights[block, i] = torch.inf  # not chosen again
            diagonal[block, i] = 1.0
            kept[block, i], left[block, i] = True, False
        check_pivots(smallest)
        if not (remain := count - first - panel):
            break
        if remain <= CROWDED * width:
            rest = left.nonzero()[:, 1].view(len(left), -1)  # the same number in each block
            factor = factor.gather(2, rest[:, None].expand(-1, panel, -1))
            sigma = _compressed(sigma, rest)
            weights, kept, left, place = (x.gather(1, rest) for x in (weights, kept, left, place))
        sigma.baddbmm_(factor.mT, factor, alpha=-1)
    return costs


def _compressed(blocks: Tensor, rest: Tensor) -> Tensor:
    """Principal blocks at `rest` (m, b), b < B, of blocks (m, B, B), written over them: allocation is slow."""
    size = rest.shape[1]
    out = blocks.view(-1)[: len(rest) * size * size].view(len(rest), size, size)
    for target, block, chosen in zip(out, blocks, rest, strict=True):  # writes only what was read before
        target.copy_(block.index_select(0, chosen).index_select(1, chosen))
    return out


def check_pivots(smallest: Tensor) -> None:
    """Refuse blocks (m,) whose smallest pivot is not positive: a cost divided by it would rank first, or be NaN."""
    if not bool((smallest > 0).all()):
        raise CurvatureError(
            f"{int((~(smallest > 0)).sum())} of {len(smallest)} blocks of the inverse Fisher are not positive definite "
            "when their weights are removed one after another; raise the damping"
        )
