"""The auxiliary fit: Q(λ) towards H⁻¹ without inverting anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit import CurvatureError
from sparsekit_fishleg.blocks import Block, Parts
from sparsekit_fishleg.products import FisherProduct
from sparsekit_fishleg.settings import FishLegSettings

Parameters = list[dict[str, Tensor]]

#: Times that the step is halved before divergence is an error.
BACK_OFFS = 4

#: A held-out residual below this, 3 % in the norm, is no divergence, whatever it was: from an exact start steps of
#: Adam's, all of one length, lead only away, and so does rounding.
EXACT = 1e-3

#: What Adam keeps of each parameter.
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fit:
    """The results of a fit.

    Attributes:
        steps: auxiliary steps taken, those undone by a back-off among them.
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
    settings: FishLegSettings,
    *,
    damping: float,
    generator: torch.Generator,
    like: Tensor,
) -> Fit:
    """Take up to `auxiliary_steps`; the blocks end in the state with the lowest held-out residual.

    Every `check_every` steps the held-out residual is measured. Above twice that of the start, everything after the
    best state is undone, the step is halved and Adam's moments are dropped; undone steps do not count. Two
    measurements in a row without progress end the fit. With refresh='auxiliary' Adam goes on from the blocks'
    `moments`, where there are any, and leaves there those of the state in which the blocks end.

    Args:
        blocks: consecutive shares of Rⁿ.
        batch: step -> product with the Fisher of a batch of examples.
        held_out: product with the layer-block Fisher of examples used for no step.
        settings: FishLeg's.
        damping: γ.
        generator: draws u.
        like: a tensor of the type and device to work in.

    Raises:
        CurvatureError: the residual of the start is not finite, or the fit still diverges after the step was halved
            BACK_OFFS times.
    """
    problem = AuxiliaryProblem(blocks, damping, settings.probes, settings.preconditioned, generator, like)
    trial, carries, rate = problem.draw(), settings.carries, settings.auxiliary_learning_rate
    parameters = [block.trainable() for block in blocks]
    optimiser = _adam(parameters, rate, [block.moments for block in blocks] if carries else None)
    best = _Best(problem.ratio(parameters, trial, held_out), 0, _copy(parameters), [block.moments for block in blocks])
    before, done, taken, idle, back_offs = best.residual, 0, 0, 0, 0
    if not math.isfinite(before):
        raise CurvatureError(
            f"the auxiliary fit cannot start: its held-out residual is {before}; raise estimator.damping"
        )
    while done < settings.auxiliary_steps and idle < 2:
        problem.step(parameters, optimiser, batch(taken))
        taken, done = taken + 1, done + 1
        if done % settings.check_every and done < settings.auxiliary_steps:
            continue
        now = problem.ratio(parameters, trial, held_out)
        if not now <= max(2 * before, EXACT):
            back_offs += 1
            if back_offs > BACK_OFFS:
                raise _divergence(before, now)
            parameters, done, idle = _leaves(best.parameters), best.steps, 0
            optimiser = _adam(parameters, rate / 2**back_offs)
            continue
        idle = 0 if now < 0.99 * best.residual else idle + 1
        if now < best.residual:
            best = _Best(now, done, _copy(parameters), _moments(parameters, optimiser) if carries else best.moments)
    if best.residual < before:
        best.absorbed_by(blocks)
    return Fit(taken, before, best.residual, back_offs)


@dataclass(frozen=True)
class _Best:
    """The state with the lowest held-out residual so far, reached after `steps`."""

    residual: float
    steps: int
    parameters: Parameters
    moments: Sequence[dict[str, Tensor]]

    def absorbed_by(self, blocks: Sequence[Block]) -> None:
        for block, found, known in zip(blocks, self.parameters, self.moments, strict=True):
            block.absorb(found)
            block.moments = known


def _divergence(before: float, now: float) -> CurvatureError:
    return CurvatureError(
        f"the auxiliary fit diverges: its held-out residual went from {before:.2e} to {now:.2e} and "
        f"still does after the step was halved {BACK_OFFS} times; lower "
        "estimator.auxiliary_learning_rate or raise estimator.damping"
    )


@dataclass(frozen=True)
class AuxiliaryProblem:
    """The auxiliary loss A(λ) = E_u [½ (Qu)ᵀH(Qu) − uᵀQu] of Q(λ), n weights, and its steps.

    It has the gradient E_u [rᵀ (∂Q/∂λ) u] with the residual r = H Q u − u held fixed. In directions of small curvature
    r is small although the error of Q is large; r is therefore replaced by Q r (`preconditioned`), which treats all
    directions alike. Both vanish at Q = H⁻¹. Where Q cannot represent the inverse, the plain gradient finds the
    minimum of E‖Qu − H⁻¹u‖²_H, and the preconditioned one the stationary point of r weighted by Q.

    Attributes:
        blocks: consecutive shares of Rⁿ.
        damping: γ.
        probes: Gaussian u for each step.
        preconditioned: see above.
        generator: draws u.
        like: a tensor of the type and device to work in.
    """

    blocks: Sequence[Block]
    damping: float
    probes: int
    preconditioned: bool
    generator: torch.Generator
    like: Tensor

    def draw(self) -> Tensor:
        """U (n, k), Gaussian."""
        shape = (sum(block.size for block in self.blocks), self.probes)
        return torch.randn(shape, generator=self.generator, device=self.generator.device).to(self.like)

    def ratio(self, parameters: Parameters, u: Tensor, fisher: FisherProduct) -> float:
        """‖r‖²_Q / ‖u‖²_Q for u (n, k)."""
        with torch.no_grad():
            Q = self._parts(parameters)
            r = self._residual(Q, u, fisher)
            return float((r * self._product(Q, r)).sum() / (u * self._product(Q, u)).sum())

    def step(self, parameters: Parameters, optimiser: torch.optim.Adam, fisher: FisherProduct) -> None:
        """One step of Adam."""
        u = self.draw()
        with torch.enable_grad():  # whatever the caller's mode
            Q = self._parts(parameters)
        with torch.no_grad():
            constant = [parts.detached() for parts in Q]
            weight = self._residual(constant, u, fisher)
            if self.preconditioned:
                weight = self._product(constant, weight)
        optimiser.zero_grad(set_to_none=True)
        for block, parts, x, w in zip(self.blocks, Q, self._split(u), self._split(weight), strict=True):
            with torch.enable_grad():  # block by block, so that the graph of one product lives at a time
                v = block.product(parts, x)
                # One scale for each block, so that Adam's ε and a shared step size mean the same in all of them; but
                # what is left of the residual of an exact Q, such as that of a layer without data, is rounding.
                scale = v.detach().norm().clamp_min(1e-30)
                size, whole = w.norm(), scale if self.preconditioned else x.norm()
                unit = torch.where(size > 100 * torch.finfo(w.dtype).eps * whole, w / size, 0.0)
                loss = (unit * v).sum() / scale
                loss.backward()
        optimiser.step()

    def _parts(self, parameters: Parameters) -> list[Parts]:
        return [block.parts(layer) for block, layer in zip(self.blocks, parameters, strict=True)]

    def _residual(self, Q: Sequence[Parts], u: Tensor, fisher: FisherProduct) -> Tensor:
        """R = H Q u − u (n, k)."""
        V = self._product(Q, u)
        return fisher(V) + self.damping * V - u

    def _product(self, Q: Sequence[Parts], X: Tensor) -> Tensor:
        """Q X for X (n, k)."""
        shares = zip(self.blocks, Q, self._split(X), strict=True)
        return torch.cat([block.product(parts, x) for block, parts, x in shares])

    def _split(self, X: Tensor) -> Sequence[Tensor]:
        return X.split([block.size for block in self.blocks])


def _adam(
    parameters: Parameters, learning_rate: float, moments: Sequence[Mapping[str, Tensor]] | None = None
) -> torch.optim.Adam:
    """Adam, continued from `moments` if there are any; they are copied, because Adam writes in place."""
    optimiser = torch.optim.Adam([t for layer in parameters for t in layer.values()], lr=learning_rate)
    for layer, known in zip(parameters, moments or [], strict=bool(moments)):
        for name, t in layer.items():
            if known:
                optimiser.state[t] = {key: known[f"{name}.{key}"].clone() for key in _MOMENTS}
                optimiser.state[t]["step"] = optimiser.state[t]["step"].cpu()  # where Adam itself has it
    return optimiser


def _moments(parameters: Parameters, optimiser: torch.optim.Adam) -> list[dict[str, Tensor]]:
    """Copies of Adam's moments, by block: {parameter}.{quantity}."""
    return [
        {f"{name}.{key}": optimiser.state[t][key].clone() for name, t in layer.items() for key in _MOMENTS}
        for layer in parameters
    ]


def _copy(parameters: Parameters) -> Parameters:
    return [{name: t.detach().clone() for name, t in layer.items()} for layer in parameters]


def _leaves(parameters: Sequence[Mapping[str, Tensor]]) -> Parameters:
    return [{name: t.clone().requires_grad_(True) for name, t in layer.items()} for layer in parameters]
