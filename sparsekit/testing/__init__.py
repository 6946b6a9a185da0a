"""The conformance kit for curvature estimators: tiny problems, dense oracles, and the checks that all must pass.

It needs no test runner. `estimator_checks` says how to use it with pytest.
"""

from sparsekit.testing.case import Case, Expected
from sparsekit.testing.checks import CHECKS, estimator_checks
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
    "problem",
    "rank_one_inverse",
]
