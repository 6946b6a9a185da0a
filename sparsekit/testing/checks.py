"""The checks that every curvature estimator must pass, and how they are applied to one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

from sparsekit.errors import unknown_name
from sparsekit.methods.interfaces import CurvatureEstimator
from sparsekit.testing import fisher_checks as fisher
from sparsekit.testing import lifecycle_checks as lifecycle
from sparsekit.testing import operator_checks as operator
from sparsekit.testing.case import Case, Expected
from sparsekit.testing.problems import PROBLEMS

Check = Callable[[Case], None]

_CHECKS: tuple[Check, ...] = (
    operator.check_symmetry,
    operator.check_positive_definiteness,
    operator.check_products,
    operator.check_precision,
    operator.check_diagonal,
    operator.check_inverse_diagonal,
    operator.check_masked_diagonal,
    operator.check_conditioned,
    operator.check_expected,
    operator.check_joint_removal,
    operator.check_joint_removal_with_gradient,
    operator.check_independent_removal,
    operator.check_removal_without_compensation,
    operator.check_joint_is_never_worse,
    operator.check_removed_stays_removed,
    operator.check_semi_structured_removal,
    lifecycle.check_update_comes_first,
    lifecycle.check_figures,
    lifecycle.check_not_a_number,
    lifecycle.check_memory,
    lifecycle.check_determinism,
    lifecycle.check_state_round_trip,
    lifecycle.check_resume,
    lifecycle.check_adopt,
    lifecycle.check_shrink,
    lifecycle.check_another_damping,
    lifecycle.check_damping_is_not_kept,
    lifecycle.check_large_damping,
    lifecycle.check_small_damping,
    lifecycle.check_order_of_examples,
    lifecycle.check_mean_over_examples,
    lifecycle.check_zero_weights,
    fisher.check_other_labels,
    fisher.check_labels_of_the_data,
    fisher.check_seed,
    fisher.check_relative_damping,
    fisher.check_update_twice,
    fisher.check_trace,
    fisher.check_diagonal_correlation,
    fisher.check_single_precision,
    fisher.check_device,
    lifecycle.check_evaluation_mode,
    lifecycle.check_model_is_left_as_found,
)

#: The checks by name.
CHECKS: Mapping[str, Check] = {check.__name__.removeprefix("check_"): check for check in _CHECKS}


def estimator_checks(
    estimator: type[CurvatureEstimator],
    settings: Mapping[str, object] | None = None,
    problems: Sequence[str] = PROBLEMS,
    expected: Expected | None = None,
    *,
    waived: Mapping[str, str] | None = None,
    tolerance: float = 1e-7,
    solve_tolerance: float = 1e-2,
    trace: tuple[float, float] = (0.67, 1.5),
    correlation: float = 0.8,
    device: str | None = None,
) -> list[tuple[str, Callable[[], None]]]:
    """Every check of an estimator on every problem, ready to be run.

    With pytest::

        CHECKS = estimator_checks(MyEstimator, settings={"damping": 0.01})

        @pytest.mark.parametrize("check", [pytest.param(run, id=name) for name, run in CHECKS])
        def test_conformance(check):
            check()

    Args:
        estimator: the class.
        settings: where they differ from the defaults.
        problems: names of PROBLEMS.
        expected: objective and settings -> the dense precision H, (n, n), where the estimator is exact; see
            `oracles.dense_fisher`, `oracles.block_mask` and `oracles.damped`. None for an approximation.
        waived: name of a check -> why the method cannot pass it, such as an estimator that is fitted at one damping
            (`another_damping`) or learns from a different share of the examples (`order_of_examples`). It is left out.
        tolerance: see Case.
        solve_tolerance: see Case.
        trace: bounds that the author states, see Case; (1 − 1e-6, 1 + 1e-6) for what is exact or unbiased.
        correlation: the same.
        device: see Case.

    Returns:
        (id, run) pairs; a run raises AssertionError with what is wrong and by how much, or the estimator's error.

    Raises:
        ValueError: a problem, or a waived check, is not known.
    """
    _known("problem", problems, PROBLEMS)
    _known("check", waived or {}, CHECKS)
    left_out = {*(waived or {}), *(() if expected else ("expected",))}
    cases = [
        Case(estimator, name, settings or {}, expected, tolerance, solve_tolerance, trace, correlation, device)
        for name in problems
    ]
    return [
        (f"{name}-{case.problem}", partial(check, case))
        for name, check in CHECKS.items()
        if name not in left_out
        for case in cases
    ]


def _known(kind: str, given: Collection[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(unknown_name(kind, name, known))
