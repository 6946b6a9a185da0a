"""The conformance kit for plugins: tiny problems, dense oracles, and the checks that all of a kind must pass.

It needs no test runner. `estimator_checks` says how to use it with pytest.
"""

from sparsekit.testing.case import Case, Expected
from sparsekit.testing.checks import CHECKS, estimator_checks
from sparsekit.testing.component_checks import pattern_checks, saliency_checks, schedule_checks
from sparsekit.testing.oracles import (
    block_mask,
    damped,
    dense_fisher,
    dense_inverse,
    dense_removal,
    dense_rows,
    exhaustive_removal,
    greedy_removal,
    rank_one_inverse,
)
from sparsekit.testing.problems import PROBLEMS, problem
from sparsekit.testing.task_checks import task_checks

__all__ = [
    "CHECKS",
    "PROBLEMS",
    "Case",
    "Expected",
    "block_mask",
    "damped",
    "dense_fisher",
    "dense_inverse",
    "dense_removal",
    "dense_rows",
    "estimator_checks",
    "exhaustive_removal",
    "greedy_removal",
    "pattern_checks",
    "problem",
    "rank_one_inverse",
    "saliency_checks",
    "schedule_checks",
    "task_checks",
]
