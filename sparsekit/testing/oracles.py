"""Dense references in float64: slow, simple, and without code in common with what they judge.

Derivatives come from `torch.func` on the network as it stands, one example at a time; the losses are written out
here; everything else is dense linear algebra. For tests, on networks of at most a few thousand weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import combinations
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.methods.interfaces import EstimatorSettings
from sparsekit.problem.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from sparsekit.problem.objective import Objective
from sparsekit.removal import Compensation

#: The kinds of Fisher in which nothing is drawn.
DenseKind = Literal["exact", "empirical"]


# -- the Fisher ----------------------------------------------------------------------------------------------
def dense_rows(objective: Objective, kind: DenseKind) -> Tensor:
    """Gradient rows G, (m, n), float64, of the network in evaluation mode, with GᵀG / N the Fisher.

    Args:
        objective: N examples, n weights; the model is not touched.
        kind: `exact`: the rows of Λ^{1/2}J, K for each example, with the Jacobian J (K, n) of its K outputs and Λ
            (K, K) the loss's Hessian in them; GᵀG / N is the Gauss-Newton matrix of the mean loss. `empirical`: the
            gradient of each example's loss at its own label, times √T where the loss is a mean over T positions.

    Raises:
        ValueError: the kind is neither.
        TypeError: the likelihood is none of Categorical, Bernoulli and Gaussian, or has weights.
    """
    if kind not in get_args(DenseKind):
        raise ValueError(f"there is no dense Fisher of the kind {kind!r}; 'exact' or 'empirical' is needed")
    model = copy.deepcopy(objective.model).double().eval().requires_grad_(False)
    rows = [
        _example_rows(model, objective, kind, x, y)
        for inputs, targets in objective.batches
        for x, y in zip(inputs.double() if inputs.is_floating_point() else inputs, targets, strict=True)
    ]
    return torch.cat(rows)


def dense_fisher(objective: Objective, kind: DenseKind) -> Tensor:
    """F, (n, n), float64: the mean over the examples, as the loss is. See `dense_rows`."""
    rows = dense_rows(objective, kind)
    return rows.mT @ rows / sum(len(targets) for _, targets in objective.batches)


def damped(fisher: Tensor, settings: EstimatorSettings) -> Tensor:
    """H = F + γI, (n, n), with γ as the settings mean it: a number, or relative to the mean of diag F."""
    relative = settings.damping_scale == "relative"
    gamma = settings.damping * (float(fisher.diagonal().mean()) if relative else 1.0)
    return fisher + gamma * torch.eye(len(fisher), dtype=fisher.dtype)


def dense_inverse(fisher: Tensor, damping: float) -> Tensor:
    """Σ = (F + γI)⁻¹, (n, n)."""
    return torch.linalg.inv(fisher + damping * torch.eye(len(fisher), dtype=fisher.dtype))


def rank_one_inverse(rows: Tensor, damping: float) -> Tensor:
    """Σ = (GᵀG/m + γI)⁻¹, (n, n), from rows G (m, n) by Σ ← Σ − Σg gᵀΣ / (m + gᵀΣg), starting from I/γ.

    Reference: Singh and Alistarh, 2020 (WoodFisher); Kurtic et al., 2022 (oBERT).
    """
    inverse = torch.eye(rows.shape[1], dtype=rows.dtype) / damping
    for g in rows:
        image = inverse @ g
        inverse = inverse - torch.outer(image, image) / (len(rows) + g @ image)
    return inverse


def block_mask(sizes: Sequence[int]) -> Tensor:
    """(n, n) bool, True inside the square blocks of these sizes along the diagonal, n their sum."""
    block = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return block[:, None] == block[None, :]


def _example_rows(model: nn.Module, objective: Objective, kind: DenseKind, x: Tensor, y: Tensor) -> Tensor:
    values: dict[str, Tensor] = {
        name: tensor for name, tensor in model.named_parameters() if name in objective.space.names
    }

    def network(values: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(model, values, (x[None],))
        return output[0]

    output = network(values)
    jacobian = torch.func.jacrev(network)(values)
    J = torch.cat([jacobian[name].reshape(output.numel(), -1) for name in objective.space.names], dim=1)
    if kind == "empirical":
        gradient = torch.func.grad(lambda f: _loss(objective.likelihood, f, y))(output)
        scale = _positions(objective.likelihood, output) ** 0.5 if objective.likelihood.reduction == "mean" else 1.0
        return scale * gradient.reshape(1, -1) @ J
    hessian = torch.func.jacrev(torch.func.jacrev(lambda f: _loss(objective.likelihood, f, y)))(output)
    spectrum, basis = torch.linalg.eigh(hessian.reshape(output.numel(), output.numel()))
    return spectrum.clamp_min(0).sqrt()[:, None] * (basis.mT @ J)


def _loss(likelihood: Likelihood, f: Tensor, y: Tensor) -> Tensor:
    """−log p(y | f) of one example up to a constant, summed or averaged over its positions."""
    if likelihood.plain != likelihood:
        raise TypeError(f"there is no dense reference for the weights of {likelihood!r}")
    if isinstance(likelihood, Categorical):
        values = f.logsumexp(0) - f.gather(0, y[None])[0]
    elif isinstance(likelihood, Bernoulli):
        values = F.softplus(f) - y * f
    elif isinstance(likelihood, Gaussian):
        values = (y - f).square() / (2 * likelihood.variance)
    else:
        raise TypeError(f"there is no dense reference for the likelihood {likelihood!r}")
    return values.mean() if likelihood.reduction == "mean" else values.sum()


def _positions(likelihood: Likelihood, output: Tensor) -> int:
    return output[0].numel() if isinstance(likelihood, Categorical) else output.numel()


# -- removal -------------------------------------------------------------------------------------------------
def dense_removal(
    H: Tensor,
    weights: Tensor,
    chosen: Tensor,
    removed: Tensor,
    how: Compensation,
    gradient: Tensor | None = None,
    *,
    sigma: Tensor | None = None,
) -> tuple[Tensor, float]:
    """The move δ (n,) that goes with a cut, and its increase gᵀδ + ½ δᵀHδ.

    Args:
        H: (n, n), the precision.
        weights: w, (n,), zero where `removed`.
        chosen: Q, (n,) bool, removed now.
        removed: R, (n,) bool, removed before; stays zero.
        how: `joint`: min over δ of gᵀδ + ½ δᵀHδ with δ = −w on Q and 0 on R, by one linear system with multipliers;
            `independent`: −Σg − Σ over i in Q of Σ[:, i] (w_i − (Σg)_i) / Σ_ii, then −w on Q and 0 on R; `none`: −w
            on Q and nothing else.
        gradient: g, (n,); zero by default. `none` does not follow it.
        sigma: the Σ of `independent`, (n, n); by default (H_SS)⁻¹ on the weights S that were not removed before.
    """
    g = torch.zeros_like(weights) if gradient is None else gradient
    fixed = chosen | removed
    target = torch.where(chosen, -weights, 0.0)
    delta = target
    if how == "joint":
        E = torch.eye(len(H), dtype=H.dtype)[fixed]
        multipliers = torch.zeros(len(E), len(E), dtype=H.dtype)
        system = torch.cat([torch.cat([H, E.mT], dim=1), torch.cat([E, multipliers], dim=1)])
        solution = torch.linalg.solve(system, torch.cat([-g, target[fixed]]))[: len(H)]
        delta = torch.where(fixed, target, solution)
    elif how == "independent":
        if sigma is None:
            kept = (~removed).nonzero()[:, 0]
            sigma = torch.zeros_like(H)
            sigma[kept[:, None], kept] = torch.linalg.inv(H[kept[:, None], kept])
        newton = sigma @ (g * ~removed)
        total = -newton
        for i in chosen.nonzero()[:, 0].tolist():
            total = total - sigma[:, i] * (weights[i] - newton[i]) / sigma[i, i]
        delta = torch.where(fixed, target, total)
    return delta, float(g @ delta + 0.5 * delta @ H @ delta)


def greedy_removal(H: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Remove `count` weights one at a time, each the cheapest given those removed before it.

    Every candidate set is solved from scratch by `dense_removal`, jointly.

    Returns:
        The indices in the order of removal, (count,), and the increase after each, (count,).
    """
    removed = torch.zeros(len(weights), dtype=torch.bool)
    order: list[int] = []
    increases: list[float] = []
    for _ in range(count):
        costs = {i: _joint_increase(H, weights, [*order, i]) for i in (~removed).nonzero()[:, 0].tolist()}
        cheapest = min(costs, key=costs.__getitem__)
        removed[cheapest] = True
        order.append(cheapest)
        increases.append(costs[cheapest])
    return torch.tensor(order), torch.tensor(increases, dtype=H.dtype)


def exhaustive_removal(H: Tensor, weights: Tensor, count: int) -> tuple[Tensor, float]:
    """The cheapest of all sets of `count` weights, removed jointly, for n ≤ 12.

    Returns:
        The set, (n,) bool, and its increase.

    Raises:
        ValueError: there are more than 12 weights.
    """
    if len(weights) > 12:
        raise ValueError(f"all subsets of {len(weights)} weights are too many; at most 12 weights are tried")
    costs = {chosen: _joint_increase(H, weights, chosen) for chosen in combinations(range(len(weights)), count)}
    best = min(costs, key=costs.__getitem__)
    return _indicator(len(weights), best), costs[best]


def _joint_increase(H: Tensor, weights: Tensor, chosen: Sequence[int]) -> float:
    none = torch.zeros(len(weights), dtype=torch.bool)
    return dense_removal(H, weights, _indicator(len(weights), chosen), none, "joint")[1]


def _indicator(size: int, indices: Sequence[int]) -> Tensor:
    flags = torch.zeros(size, dtype=torch.bool)
    flags[list(indices)] = True
    return flags
