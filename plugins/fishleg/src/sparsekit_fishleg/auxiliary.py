"""The auxiliary fit: Q(λ) towards H⁻¹ without inverting anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit import CurvatureError
from sparsekit_fishleg.blocks import Block

#: F V for V (n, k), by the examples of one batch or of all held-out ones.
FisherProduct = Callable[[Tensor], Tensor]
Parameters = list[dict[str, Tensor]]

#: Times that the step is halved before divergence is an error.
BACK_OFFS = 4


@dataclass(frozen=True)
class Fit:
    """How a fit went.

    Attributes:
        steps: auxiliary steps taken.
        before, after: held-out residual E‖r‖²_Q / E‖u‖²_Q at the start and of what was kept.
        back_offs: times the step was halved.
    """

    steps: int
    before: float
    after: float
    back_offs: int


def fit(
    blocks: Sequence[Block],
    batch: Callable[[int], FisherProduct],
    held_out: FisherProduct,
    *,
    damping: float,
    steps: int,
    probes: int,
    learning_rate: float,
    check_every: int,
    preconditioned: bool,
    keep: Tensor | None,
    generator: torch.Generator,
    size: int,
    like: Tensor,
) -> Fit:
    """Take up to `steps` auxiliary steps; the blocks end in the best state that the held-out residual saw.

    A(λ) = E_u [½ (Qu)ᵀH(Qu) − uᵀQu] has the gradient E_u [rᵀ (∂Q/∂λ) u] with the residual r = H Q u − u held
    fixed. In directions of small curvature r is small although the error of Q is large; r is therefore replaced
    by Q r (`preconditioned`), which treats all directions alike. Both vanish at Q = H⁻¹. Where Q cannot represent
    the inverse, the plain gradient finds the minimum of E‖Qu − H⁻¹u‖²_H, and the preconditioned one the stationary
    point of r weighted by Q.

    Args:
        blocks: consecutive shares of Rⁿ.
        batch: step -> product with the Fisher of a batch of examples.
        held_out: product with the Fisher of examples used for no step.
        damping: γ.
        steps: at most so many of Adam's.
        probes: Gaussian u for each step.
        learning_rate: Adam's.
        check_every: steps between looks at the held-out residual; two looks without progress end the fit.
        preconditioned: see above.
        keep: (n,) bool; with it u lives on these weights and H is restricted to them. None: all.
        generator: draws u.
        size: n.
        like: a tensor of the type and device to work in.

    Raises:
        CurvatureError: the fit still diverges after the step was halved BACK_OFFS times.
    """
    inside = None if keep is None else keep.to(like.dtype)[:, None]
    sizes = [block.size for block in blocks]

    def draw() -> Tensor:
        u = torch.randn(size, probes, generator=generator, device=generator.device).to(like)
        return u if inside is None else inside * u

    def product(parameters: Parameters, X: Tensor) -> Tensor:
        parts = zip(blocks, parameters, X.split(sizes), strict=True)
        V = torch.cat([block.product(p, x) for block, p, x in parts])
        return V if inside is None else inside * V

    def residual(parameters: Parameters, u: Tensor, fisher: FisherProduct) -> Tensor:
        with torch.no_grad():
            V = product(parameters, u)
            r = fisher(V) + damping * V - u
            return r if inside is None else inside * r

    trial = draw()

    def held_out_residual(parameters: Parameters) -> float:
        with torch.no_grad():
            r = residual(parameters, trial, held_out)
            return float((r * product(parameters, r)).sum() / (trial * product(parameters, trial)).sum())

    parameters = [block.trainable() for block in blocks]
    optimiser = _adam(parameters, learning_rate)
    best, before = _copy(parameters), held_out_residual(parameters)
    lowest, idle, back_offs, taken = before, 0, 0, 0
    while taken < steps:
        u = draw()
        r = residual(parameters, u, batch(taken))
        with torch.no_grad():
            weight = product(parameters, r) if preconditioned else r
            # One scale for each block, so that Adam's ε and a shared step size mean the same in all of them.
            parts = [w / w.norm().clamp_min(1e-30) for w in weight.split(sizes)]
        images = zip(parts, product(parameters, u).split(sizes), strict=True)
        loss = torch.stack([(w * v).sum() / v.detach().norm().clamp_min(1e-30) for w, v in images]).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        taken += 1
        if taken % check_every and taken < steps:
            continue
        now = held_out_residual(parameters)
        if not now <= 2 * before:
            back_offs += 1
            if back_offs > BACK_OFFS:
                raise CurvatureError(
                    f"the auxiliary fit diverges: its held-out residual went from {before:.2e} to {now:.2e} and "
                    f"still does after the step was halved {BACK_OFFS} times; lower "
                    "estimator.auxiliary_learning_rate or raise estimator.damping"
                )
            parameters = _leaves(best)
            optimiser = _adam(parameters, learning_rate / 2**back_offs)
            continue
        idle = 0 if now < 0.99 * lowest else idle + 1
        if now < lowest:
            best, lowest = _copy(parameters), now
        if idle == 2:
            break
    if lowest < before:
        for block, found in zip(blocks, best, strict=True):
            block.absorb(found)
    return Fit(taken, before, lowest, back_offs)


def _adam(parameters: Parameters, learning_rate: float) -> torch.optim.Adam:
    return torch.optim.Adam([t for layer in parameters for t in layer.values()], lr=learning_rate)


def _copy(parameters: Parameters) -> Parameters:
    return [{name: t.detach().clone() for name, t in layer.items()} for layer in parameters]


def _leaves(parameters: Sequence[Mapping[str, Tensor]]) -> Parameters:
    return [{name: t.clone().requires_grad_(True) for name, t in layer.items()} for layer in parameters]
