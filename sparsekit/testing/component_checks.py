"""Conformance of saliencies, patterns and schedules; see `checks` for how the results are used with pytest.

Each function gives (id, run) pairs; a run raises AssertionError with what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from sparsekit.errors import SettingsError
from sparsekit.methods.contracts import scores_of
from sparsekit.methods.interfaces import Pattern, Saliency, Schedule, ScoreContext
from sparsekit.methods.pattern import Units
from sparsekit.problem.likelihoods import Gaussian
from sparsekit.problem.objective import Objective
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.removal import Compensation, InverseFisher
from sparsekit.testing.case import assert_near
from sparsekit.testing.oracles import dense_fisher
from sparsekit.testing.problems import problem

Checks = list[tuple[str, Callable[[], None]]]

#: γ of the context's Σ, relative to the mean of diag F.
DAMPING = 0.1


class Context(ScoreContext):
    """The inputs of a saliency from a dense Fisher, all in float64."""

    def __init__(
        self, objective: Objective, mask: Mask, *, damping: float = DAMPING, units: Units | None = None, seed: int = 0
    ) -> None:
        from sparsekit.linalg import BlockDiagonal

        self._objective, self._mask, self._units = objective, mask, units
        F = dense_fisher(objective, "exact")
        gamma = damping * float(F.diagonal().mean())
        self._precision = F + gamma * torch.eye(len(F), dtype=F.dtype)
        self._inverse = InverseFisher(BlockDiagonal.of_precision(self._precision[None], [len(F)]), gamma)
        self._weights = torch.where(mask.kept, objective.space.read(objective.model), 0.0)
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def weights(self) -> Tensor:
        return self._weights

    @property
    def mask(self) -> Mask:
        return self._mask

    @property
    def inverse(self) -> InverseFisher:
        return self._inverse

    @property
    def gradient(self) -> Tensor:
        return self._objective.gradient()

    def diagonal(self, fisher: str) -> Tensor:
        return dense_fisher(self._objective, "empirical" if fisher == "empirical" else "exact").diagonal()

    @property
    def space(self) -> ParameterSpace:
        return self._objective.space

    @property
    def units(self) -> Units | None:
        return self._units

    @property
    def generator(self) -> torch.Generator:
        return self._generator


# -- saliencies --------------------------------------------------------------------------------------------
def saliency_checks(
    saliency: type[Saliency],
    settings: Mapping[str, object] | None = None,
    *,
    units: Callable[[ParameterSpace], Units | None] = lambda space: None,
    exact: Compensation | None = None,
    expected: Callable[[ScoreContext], Tensor] | None = None,
    waived: Mapping[str, str] | None = None,
) -> Checks:
    """Every check of a saliency.

    Args:
        saliency: the class.
        settings: where they differ from the defaults.
        units: space -> the pattern's groups, for saliencies of groups.
        exact: the compensation with which a score is the cost of removing that weight alone, which then must be right
            on a quadratic loss; None: it is no cost.
        expected: context -> scores, (n,), where a formula can be written down.
        waived: name of a check -> why it cannot pass.
    """
    made = saliency(saliency.Settings(**(settings or {})))
    checks: dict[str, Callable[[], None]] = {
        "scores": partial(_scores, made, units),
        "removed_weights": partial(_removed_weights, made, units),
        "same_seed": partial(_same_seed, made, units),
        "nothing_changes": partial(_nothing_changes, made, units),
    }
    if exact is not None:
        checks["exact_on_a_quadratic"] = partial(_exact_on_a_quadratic, made, exact)
    if expected is not None:
        checks["expected"] = partial(_expected, made, units, expected)
    return _but(checks, waived)


def _but(checks: Mapping[str, Callable[[], None]], waived: Mapping[str, str] | None) -> Checks:
    for name in waived or {}:
        if name not in checks:
            raise ValueError(f"there is no check '{name}'; known: {', '.join(checks)}")
    return [(name, run) for name, run in checks.items() if name not in (waived or {})]


def _mask(objective: Objective, fraction: float) -> Mask:
    order = torch.rand(objective.space.size, generator=torch.Generator().manual_seed(1))
    return Mask(order >= fraction)


def _context(
    name: str, fraction: float, units: Callable[[ParameterSpace], Units | None], seed: int = 0
) -> tuple[Objective, Context]:
    objective = problem(name)
    context = Context(objective, _mask(objective, fraction), units=units(objective.space), seed=seed)
    objective.space.write(objective.model, context.weights)
    return objective, context


def _scores(saliency: Saliency, units: Callable[[ParameterSpace], Units | None]) -> None:
    for name in ("mlp", "convolution"):
        _, context = _context(name, 0.0, units)
        scores = scores_of(saliency, context)
        if not bool(scores.isfinite().all()):
            raise AssertionError(f"{int((~scores.isfinite()).sum())} scores of {len(scores)} are not finite")
        if saliency.of_groups:
            continue
        if bool((scores == scores[0]).all()):
            raise AssertionError("all weights have the same score: nothing is ranked")


def _removed_weights(saliency: Saliency, units: Callable[[ParameterSpace], Units | None]) -> None:
    for name in ("mlp", "convolution"):
        _, context = _context(name, 0.4, units)
        scores = scores_of(saliency, context)
        bad = int((~scores[context.mask.kept].isfinite()).sum())
        if bad:
            raise AssertionError(
                f"with 40 % of the weights removed, {bad} scores of kept ones are not finite: is something divided by "
                "what is zero where weights are removed?"
            )


def _same_seed(saliency: Saliency, units: Callable[[ParameterSpace], Units | None]) -> None:
    found = [scores_of(saliency, _context("mlp", 0.2, units, seed=7)[1]) for _ in range(2)]
    if not torch.equal(*found):
        raise AssertionError("the same seed of the context's generator gives other scores: draw from it alone")


def _nothing_changes(saliency: Saliency, units: Callable[[ParameterSpace], Units | None]) -> None:
    objective, context = _context("mlp", 0.2, units)
    weights, kept = context.weights.clone(), context.mask.kept.clone()
    inside = objective.space.read(objective.model).clone()
    scores_of(saliency, context)
    same = (
        torch.equal(context.weights, weights)
        and torch.equal(context.mask.kept, kept)
        and torch.equal(objective.space.read(objective.model), inside)
    )
    if not same:
        raise AssertionError("scoring has changed weights or mask; they are the caller's")


def _quadratic() -> Objective:
    """Least squares at their minimum: the loss is its own quadratic model."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(30, 5, generator=draw, dtype=torch.float64)
    targets = inputs @ torch.randn(5, 2, generator=draw, dtype=torch.float64)
    targets = targets + 0.3 * torch.randn(targets.shape, generator=draw, dtype=torch.float64)
    model = nn.Linear(5, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(inputs, targets).solution.mT)
    return Objective(model, Gaussian(), [(inputs, targets)], ParameterSpace.of(model))


def _exact_on_a_quadratic(saliency: Saliency, how: Compensation) -> None:
    objective = _quadratic()
    space, before = objective.space, objective.loss()
    context = Context(objective, Mask.full(space.size), damping=1e-9)
    scores, weights = scores_of(saliency, context), context.weights
    costs = []
    for i in range(space.size):
        chosen = torch.arange(space.size) == i
        space.write(objective.model, weights + context.inverse.remove(weights, context.mask, chosen, how).delta)
        costs.append(objective.loss() - before)
    space.write(objective.model, weights)
    truth = torch.tensor(costs, dtype=torch.float64)
    assert_near(
        f"scores against what the removal of each weight costs on a quadratic loss, compensation {how} (a missing ½? "
        "H_ii for 1/Σ_ii?)",
        scores,
        truth,
        1e-6,
    )


def _expected(
    saliency: Saliency,
    units: Callable[[ParameterSpace], Units | None],
    expected: Callable[[ScoreContext], Tensor],
) -> None:
    for fraction in (0.0, 0.3):
        _, context = _context("mlp", fraction, units)
        kept = context.mask.kept
        assert_near("scores", scores_of(saliency, context)[kept], expected(context)[kept], 1e-9)


# -- patterns ----------------------------------------------------------------------------------------------
SPACE = {"conv": (8, 4, 3, 3), "linear": (6, 40), "bias": (6,)}


def pattern_checks(
    pattern: type[Pattern], settings: Mapping[str, object] | None = None, *, waived: Mapping[str, str] | None = None
) -> Checks:
    """Every check of a pattern.

    Args:
        pattern: the class.
        settings: where they differ from the defaults.
        waived: name of a check -> why it cannot pass.
    """
    made = pattern(pattern.Settings(**(settings or {})))
    checks = {
        "exact_counts": partial(_exact_counts, made),
        "removed_once": partial(_removed_once, made),
        "nested": partial(_nested, made),
        "ties": partial(_ties, made),
        "groups": partial(_groups, made),
    }
    return _but(checks, waived)


def _levels(pattern: Pattern, space: ParameterSpace) -> list[tuple[float, int]]:
    """Sparsities that the pattern reaches, with their counts."""
    found = []
    for sparsity in (0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9):
        try:
            found.append((sparsity, pattern.count(space, sparsity)))
        except SettingsError:
            continue
    if not any(count for _, count in found):
        raise AssertionError("the pattern reaches no sparsity above zero on convolutions and linear layers")
    return found


def _drawn(space: ParameterSpace) -> Tensor:
    return torch.rand(space.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _exact_counts(pattern: Pattern) -> None:
    space = ParameterSpace(SPACE)
    counts = [count for _, count in _levels(pattern, space)]
    if counts != sorted(counts):
        raise AssertionError(f"a higher sparsity has a smaller count: {counts}")
    for sparsity, count in _levels(pattern, space):
        chosen = pattern.choose(_drawn(space), Mask.full(space.size), count, space)
        if int(chosen.sum()) != count:
            raise AssertionError(f"at {sparsity} {int(chosen.sum())} weights are chosen; {count} was the count")


def _removed_once(pattern: Pattern) -> None:
    space, mask = ParameterSpace(SPACE), Mask.full(ParameterSpace(SPACE).size)
    for step, (sparsity, count) in enumerate(_levels(pattern, space)):
        draw = torch.Generator().manual_seed(step)
        scores = torch.rand(space.size, generator=draw, dtype=torch.float64)  # other ones at each cut
        chosen = pattern.choose(scores, mask, count, space)
        if bool((chosen & mask.removed).any()):
            raise AssertionError(f"at {sparsity} weights are chosen that were removed before")
        mask = mask.without(chosen)
        if mask.removed_count != count:
            raise AssertionError(f"along several cuts {mask.removed_count} are removed at {sparsity}; {count} was due")


def _nested(pattern: Pattern) -> None:
    space, before = ParameterSpace(SPACE), None
    for sparsity, count in _levels(pattern, space):
        chosen = pattern.choose(_drawn(space), Mask.full(space.size), count, space)
        if before is not None and bool((before & ~chosen).any()):
            raise AssertionError(
                f"by the same scores a weight that goes at a lower sparsity stays at {sparsity}: choices are not nested"
            )
        before = chosen


def _ties(pattern: Pattern) -> None:
    space = ParameterSpace(SPACE)
    count = pattern.count(space, 0.5)
    equal = torch.ones(space.size, dtype=torch.float64)
    first, second = (pattern.choose(equal, Mask.full(space.size), count, space) for _ in range(2))
    if int(first.sum()) != count or not torch.equal(first, second):
        raise AssertionError(f"equal scores: {int(first.sum())} are chosen of {count}, or others the second time")


def _groups(pattern: Pattern) -> None:
    space = ParameterSpace(SPACE)
    units = pattern.units(space)
    if units is None:
        return
    most = max(count for _, count in _levels(pattern, space))
    chosen = pattern.choose(_drawn(space), Mask.full(space.size), most, space)
    removed = chosen[units.index].sum(1)
    if bool((removed > units.removed).any()):
        raise AssertionError(f"a group loses {int(removed.max())} weights; {units.removed} at most are to go")
    outside = chosen.clone()
    outside[units.index.flatten()] = False
    if bool(outside.any()):
        raise AssertionError(f"{int(outside.sum())} weights are chosen that are in no group")


# -- schedules ---------------------------------------------------------------------------------------------
def schedule_checks(
    schedule: type[Schedule], settings: Mapping[str, object] | None = None, *, waived: Mapping[str, str] | None = None
) -> Checks:
    """Every check of a schedule: it rises strictly from its start, and ends at its target exactly.

    Args:
        schedule: the class.
        settings: where they differ from the defaults.
        waived: name of a check -> why it cannot pass.
    """
    made = schedule(schedule.Settings(**(settings or {})))
    return _but({"rises": partial(_rises, made), "reaches": partial(_reaches, made)}, waived)


CASES = [(0.0, 0.9, 1), (0.0, 0.9, 2), (0.0, 0.5, 7), (0.3, 0.95, 5), (0.9, 0.99, 20)]


def _rises(schedule: Schedule) -> None:
    for start, target, steps in CASES:
        values = [start, *schedule.sparsities(start, target, steps)]
        if not all(a < b for a, b in zip(values, values[1:], strict=False)):
            raise AssertionError(f"from {start} to {target} in {steps} steps it does not rise: {values}")


def _reaches(schedule: Schedule) -> None:
    for start, target, steps in CASES:
        values = list(schedule.sparsities(start, target, steps))
        if not values or values[-1] != target:
            raise AssertionError(f"from {start} to {target} in {steps} steps it ends at {values[-1:]}; {target} is due")
