"""Checks of what an estimator returns: Σ as a matrix, and the cuts made with it.

Each takes a Case and raises AssertionError with what is wrong and by how much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sparsekit.methods.patterns import NM, NMSettings, Unstructured
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.removal import Compensation, InverseFisher
from sparsekit.testing.case import Case, assert_near, cuts, dense
from sparsekit.testing.oracles import dense_removal


# -- Σ as a matrix -------------------------------------------------------------------------------------------
def check_symmetry(case: Case) -> None:
    """Σ = Σᵀ."""
    sigma = dense(case.inverse())
    assert_near("Σ is not symmetric", sigma, sigma.mT, case.tolerance)


def check_positive_definiteness(case: Case) -> None:
    """The least eigenvalue of Σ is positive."""
    sigma = dense(case.inverse())
    spectrum = torch.linalg.eigvalsh((sigma + sigma.mT) / 2)
    if not float(spectrum[0]) > 0:
        raise AssertionError(
            f"Σ is not positive definite: its eigenvalues go from {float(spectrum[0]):.3e} to {float(spectrum[-1]):.3e}"
        )


def check_products(case: Case) -> None:
    """Σ X for X (n,), (n, 1) and (n, 3) is what the dense Σ gives, in shape and value."""
    inverse = case.inverse()
    _compare_products("Σ X", inverse.__matmul__, dense(inverse), case.tolerance)


def check_precision(case: Case) -> None:
    """H X for X (n,), (n, 1) and (n, 3) is what the inverse of the dense Σ gives."""
    inverse = case.inverse()
    _compare_products("H X", inverse.precision, torch.linalg.inv(dense(inverse)), case.tolerance)


def check_diagonal(case: Case) -> None:
    """The diagonal of Σ is that of the dense Σ, and positive."""
    inverse = case.inverse()
    diagonal = inverse.operator.diagonal()
    if not bool((diagonal > 0).all()):
        raise AssertionError(
            f"diag Σ is not positive: {int((~(diagonal > 0)).sum())} of {len(diagonal)} entries, the least "
            f"{float(diagonal.min()):.3e}; weights with such entries would be removed first"
        )
    assert_near("diag Σ", diagonal, dense(inverse).diagonal(), case.tolerance)


def check_inverse_diagonal(case: Case) -> None:
    """The diagonal of H is that of the inverse of the dense Σ."""
    inverse = case.inverse()
    truth = torch.linalg.inv(dense(inverse)).diagonal()
    assert_near("diag H", inverse.operator.inverse_diagonal(), truth, case.tolerance)


def check_masked_diagonal(case: Case) -> None:
    """The diagonal of Σ given removed weights is zero on them; elsewhere positive and at most that without a mask.

    (H_SS)⁻¹ is Σ_SS less a positive semidefinite matrix, so conditioning can only lower the diagonal.
    """
    inverse = case.inverse()
    for cut in cuts(case.objective()):
        diagonal = inverse.diagonal(cut.mask)
        kept = cut.mask.kept
        if bool((diagonal[~kept] != 0).any()):
            worst = float(diagonal[~kept].abs().max())
            raise AssertionError(f"diag Σ is {worst:.3e} on a weight that was removed before {cut.name}; 0 is right")
        excess = float((diagonal / inverse.diagonal())[kept].max()) - 1
        if not excess <= case.tolerance:
            raise AssertionError(f"before {cut.name}, diag Σ given removed weights is {excess:.1e} too large")


def check_conditioned(case: Case) -> None:
    """Given removed weights, Σ on the others lies between (H_SS)⁻¹, which is exact, and Σ_SS."""
    objective = case.objective()
    estimator = case.updated(objective)
    inverse = estimator.inverse()
    sigma = dense(inverse)
    for cut in cuts(objective):
        S = cut.mask.kept.nonzero()[:, 0]
        least = torch.linalg.inv(torch.linalg.inv(sigma)[S[:, None], S])
        found = inverse.conditioned(cut.mask).dense()[S[:, None], S]
        scale = float(torch.linalg.eigvalsh(sigma)[-1])
        for what, difference in (("below (H_SS)⁻¹", found - least), ("above Σ_SS", sigma[S[:, None], S] - found)):
            lowest = float(torch.linalg.eigvalsh(difference)[0]) / scale
            if not lowest >= -case.tolerance:
                raise AssertionError(f"{cut.name}: Σ given removed weights is {what}, by {-lowest:.1e} of ‖Σ‖")


def check_expected(case: Case) -> None:
    """Σ is the inverse of the expected precision, from all examples and from a single one."""
    assert case.expected is not None
    whole = case.objective()
    (inputs, targets), *_ = whole.batches
    for what, objective in (
        ("all examples", whole),
        ("one example", replace(whole, batches=[(inputs[:1], targets[:1])])),
    ):
        estimator = case.updated(objective)
        truth = torch.linalg.inv(case.expected(objective, estimator.settings))
        found = dense(estimator.inverse())
        assert_near(f"Σ from {what} against the expected precision's inverse", found, truth, case.tolerance)


def _compare_products(what: str, product: Callable[[Tensor], Tensor], matrix: Tensor, tolerance: float) -> None:
    draw = torch.Generator().manual_seed(2)
    for shape in ((len(matrix),), (len(matrix), 1), (len(matrix), 3)):
        X = torch.randn(shape, generator=draw, dtype=torch.float64)
        assert_near(f"{what} for X {tuple(shape)}", product(X), matrix @ X, tolerance)


# -- removal -------------------------------------------------------------------------------------------------
def check_joint_removal(case: Case) -> None:
    """δ = Σ[:, C] Σ[C, C]⁻¹ t and its increase, with what was removed before in C."""
    _compare_removals(case, "joint", case.solve_tolerance)


def check_joint_removal_with_gradient(case: Case) -> None:
    """The same with the first-order term gᵀδ."""
    _compare_removals(case, "joint", case.solve_tolerance, with_gradient=True)


def check_independent_removal(case: Case) -> None:
    """δ is the sum of the single-weight solutions on what survives."""
    _compare_removals(case, "independent", case.tolerance)


def check_removal_without_compensation(case: Case) -> None:
    """δ moves no other weight."""
    _compare_removals(case, "none", case.tolerance)


def check_joint_is_never_worse(case: Case) -> None:
    """For the same cut the predicted increase of `joint` is at most those of `independent` and `none`."""
    inverse = case.inverse()
    for cut in cuts(case.objective()):
        joint, independent, none = (
            inverse.remove(cut.weights, cut.mask, cut.chosen, how).increase for how in ("joint", "independent", "none")
        )
        least = min(independent, none)
        if not joint <= least * (1 + case.solve_tolerance**2):  # the solve's error enters squared
            raise AssertionError(
                f"{cut.name}: the predicted increase of joint removal is {joint:.6g}, independent {independent:.6g}, "
                f"none {none:.6g}"
            )


def check_removed_stays_removed(case: Case) -> None:
    """Across three cuts to 90 %, whatever was removed is exactly zero, and the counts are exact."""
    objective = case.objective()
    inverse, space = case.updated(objective).inverse(), objective.space
    weights, mask = space.read(objective.model), Mask.full(space.size)
    for sparsity in (0.3, 0.6, 0.9):
        chosen = _choose(inverse, weights, mask, Unstructured(None), sparsity, space)
        weights = weights + inverse.remove(weights, mask, chosen).delta
        mask = mask.without(chosen)
        wanted = round(sparsity * space.size)
        back = int((weights[mask.removed] != 0).sum())
        if back or mask.removed_count != wanted or int((weights == 0).sum()) != wanted:
            raise AssertionError(
                f"at sparsity {sparsity}, {wanted} weights of {space.size} are to be zero: {mask.removed_count} are "
                f"removed, {int((weights == 0).sum())} are zero, {back} that were removed came back"
            )


def check_semi_structured_removal(case: Case) -> None:
    """Under 2:4 exactly two weights of each whole group of four inputs of an output, at a place of the kernel, stay."""
    objective = case.objective()
    inverse, space = case.updated(objective).inverse(), objective.space
    weights, mask = space.read(objective.model), Mask.full(space.size)
    chosen = _choose(inverse, weights, mask, NM(NMSettings(n=2, m=4)), 0.5, space)
    after = space.unflatten(weights + inverse.remove(weights, mask, chosen).delta)
    for name, tensor in after.items():
        by_output = tensor.reshape(*tensor.shape[:2], -1) if tensor.dim() > 1 else tensor[:, None, None]
        for row in by_output.mT.flatten(0, 1):
            for group in row.split(4):
                kept, wanted = int((group != 0).sum()), 2 if len(group) == 4 else len(group)
                if kept != wanted:
                    raise AssertionError(f"{kept} of a group of {len(group)} weights of '{name}' stay under 2:4")


def _choose(
    inverse: InverseFisher,
    weights: Tensor,
    mask: Mask,
    pattern: Unstructured | NM,
    sparsity: float,
    space: ParameterSpace,
) -> Tensor:
    """What OBS removes: the lowest w² / 2Σ_ii."""
    scores = torch.where(mask.kept, weights.square() / (2 * inverse.diagonal(mask)), 0.0)
    return pattern.choose(scores, mask, pattern.count(space, sparsity), space)


def _compare_removals(case: Case, how: Compensation, tolerance: float, *, with_gradient: bool = False) -> None:
    objective = case.objective()
    estimator = case.updated(objective)
    inverse = estimator.inverse()
    references = {"its own dense H": torch.linalg.inv(dense(inverse))}
    if case.expected is not None:
        references["the expected H"] = case.expected(objective, estimator.settings)
    gradient = objective.gradient() if with_gradient else None
    for cut in cuts(objective):
        removal = inverse.remove(cut.weights, cut.mask, cut.chosen, how, gradient)
        for against, H in references.items():
            what = f"{how} removal, {cut.name}, against {against}"
            sigma = inverse.conditioned(cut.mask).dense()
            truth, _ = dense_removal(H, cut.weights, cut.chosen, cut.mask.removed, how, gradient, sigma=sigma)
            off = _length(removal.delta - truth, H) / _length(truth, H)
            if not off <= tolerance:
                raise AssertionError(f"{what}: ‖δ − δ*‖_H is {off:.1e} of ‖δ*‖_H; {tolerance:.0e} is allowed")
            _compare_increase(what, removal.increase, removal.delta, H, gradient, case.tolerance)


def _length(v: Tensor, H: Tensor) -> float:
    return max(float(v @ H @ v), 0.0) ** 0.5


def _compare_increase(
    what: str, increase: float, delta: Tensor, H: Tensor, gradient: Tensor | None, tolerance: float
) -> None:
    curved = float(0.5 * delta @ H @ delta)
    straight = 0.0 if gradient is None else float(gradient @ delta)
    if not abs(increase - (straight + curved)) <= tolerance * (abs(straight) + curved):
        raise AssertionError(
            f"{what}: the increase is given as {increase:.6g}; gᵀδ + ½ δᵀHδ is {straight + curved:.6g}"
        )
