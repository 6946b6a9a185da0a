"""The case that a check is given, and its comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from sparsekit.curvature.vectors import FisherKind
from sparsekit.methods.interfaces import CurvatureEstimator
from sparsekit.problem.objective import Objective
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.removal import InverseFisher
from sparsekit.testing.problems import problem

Expected = Callable[[Objective, Any], Tensor]
"""The objective and the estimator's settings -> the precision H = F + γI, (n, n), that Σ must be the inverse of."""


@dataclass(frozen=True)
class Case:
    """One estimator with one set of settings on one problem.

    Attributes:
        estimator: the class.
        problem: a name of PROBLEMS.
        settings: of the estimator, where they differ from its defaults.
        expected: the dense H that an exact estimator must reproduce; None for an approximation.
        tolerance: of products, relative to the largest entry; rounding in float64 by default.
        trace: least and greatest of trace(H − γI) over the Fisher's, see `fisher_checks`.
        correlation: least of diag(H − γI) with the Fisher's diagonal.
        device: one that Σ must be the same on, besides the CPU; None: a GPU, if there is one.
        solve_tolerance: of joint removal, whose conjugate gradients stop early: ‖δ − δ*‖_H / ‖δ*‖_H.
    """

    estimator: type[CurvatureEstimator]
    problem: str
    settings: Mapping[str, object] = field(default_factory=dict)
    expected: Expected | None = None
    tolerance: float = 1e-7
    solve_tolerance: float = 1e-2
    trace: tuple[float, float] = (0.67, 1.5)
    correlation: float = 0.8
    device: str | None = None

    def objective(self) -> Objective:
        """A new instance of the problem."""
        return problem(self.problem)

    def made(self, objective: Objective, **changes: object) -> CurvatureEstimator:
        """The estimator as it is before any update; `changes` are settings."""
        return self.estimator(objective.space, self.estimator.Settings(**{**self.settings, **changes}))

    def updated(self, objective: Objective, *, seed: int = 0, **changes: object) -> CurvatureEstimator:
        """The estimator after one update."""
        estimator = self.made(objective, **changes)
        estimator.update(objective, generator=torch.Generator().manual_seed(seed))
        return estimator

    def inverse(self, **changes: Any) -> InverseFisher:
        """Σ after one update on the problem."""
        return self.updated(self.objective(), **changes).inverse()

    def deterministic_kinds(self) -> tuple[FisherKind, ...]:
        """The kinds of Fisher without a draw, as far as the estimator's settings allow them."""
        return self.kinds("exact", "empirical")

    def kinds(self, *wanted: FisherKind) -> tuple[FisherKind, ...]:
        """Those of the wanted kinds of Fisher that the estimator's settings allow."""
        return tuple(kind for kind in wanted if self._allows(fisher=kind))

    def _allows(self, **changes: object) -> bool:
        try:
            self.estimator.Settings(**{**self.settings, **changes})
        except ValidationError:
            return False
        return True


@dataclass(frozen=True)
class Cut:
    """Weights (n,), zero where removed before; the mask before the cut; and what is removed now, (n,) bool."""

    name: str
    weights: Tensor
    mask: Mask
    chosen: Tensor


def cuts(objective: Objective) -> Iterator[Cut]:
    """A first small cut, a second past half of the weights, and one that leaves nothing."""
    weights = objective.space.read(objective.model)
    order = torch.rand(len(weights), generator=torch.Generator().manual_seed(1))
    for name, before, after in (("first", 0.0, 0.2), ("second", 0.3, 0.7), ("last", 0.3, 1.0)):
        removed = order < before
        chosen = (order < after) & ~removed
        yield Cut(f"the {name} cut", torch.where(removed, 0.0, weights), Mask(~removed), chosen)


def dense(inverse: InverseFisher) -> Tensor:
    """Σ, (n, n), by its products with the unit vectors."""
    return inverse @ torch.eye(inverse.size, dtype=torch.float64, device=inverse.operator.device)


def assert_near(what: str, found: Tensor, truth: Tensor, tolerance: float, space: ParameterSpace | None = None) -> None:
    """Fail unless max |found − truth| ≤ tolerance · max |truth|, saying where (by parameter) and by how much."""
    if found.shape != truth.shape:
        raise AssertionError(f"{what}: the shape is {tuple(found.shape)} where {tuple(truth.shape)} is right")
    error = (found.double() - truth.double()).abs()
    scale = float(truth.abs().max())
    if not float(error.max()) <= tolerance * scale:
        worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        place = str(worst) if space is None else " × ".join(place_of(index, space) for index in worst)
        raise AssertionError(
            f"{what}: {float(found[worst]):.6g} at {place} where {float(truth[worst]):.6g} is right, off by "
            f"{float(error.max()) / max(scale, 1e-300):.1e} of the largest entry; {tolerance:.0e} is allowed"
        )


def place_of(index: int, space: ParameterSpace) -> str:
    """'0.weight[2, 1]', of a coordinate of the space."""
    info = next(info for info in space.parameters if info.start <= index < info.start + info.size)
    within = torch.unravel_index(torch.tensor(index - info.start), info.shape)
    return f"{info.name}[{', '.join(str(int(i)) for i in within)}]"


def assert_identical(what: str, found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    """Fail unless both have the same names and bitwise equal tensors."""
    if found.keys() != truth.keys():
        odd = sorted(found.keys() ^ truth.keys())
        raise AssertionError(f"{what}: {', '.join(odd)} on one side only")
    for name, tensor in truth.items():
        if not torch.equal(found[name], tensor):
            raise AssertionError(f"{what}: {name} differs{_by_how_much(found[name], tensor)}")


def _by_how_much(found: Tensor, truth: Tensor) -> str:
    if found.shape != truth.shape:
        return f" in shape, {tuple(found.shape)} from {tuple(truth.shape)}"
    return f" by up to {float((found.double() - truth.double()).abs().max()):.1e}"
