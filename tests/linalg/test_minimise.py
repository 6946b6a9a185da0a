"""One signature for constrained minima; structures write a hook, and subclasses may override the method itself."""

import pytest
import torch

from sparsekit import linalg
from sparsekit.linalg import BlockDiagonal, ConstrainedMinimum, Diagonal, DirectSum, LinearOperator

OPERATORS = [c for c in vars(linalg).values() if isinstance(c, type) and issubclass(c, LinearOperator)]
FIXED = torch.tensor([True, False, False])


class Five(Diagonal):
    """Written when structures overrode the method itself."""

    def minimise(self, fixed, values, linear=None, *, start=None, tolerance=1e-4, max_iterations=1000):
        assert (tolerance, max_iterations) == (1e-4, 1000)
        return ConstrainedMinimum(torch.where(fixed, values, 5.0))


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
def test_every_structure_has_the_one_minimise(operator):
    assert operator.minimise is LinearOperator.minimise


def test_a_sum_uses_the_minimise_that_a_part_overrides():
    found = DirectSum([Five(torch.ones(3)), Diagonal(torch.ones(3))]).minimise(FIXED.repeat(2), torch.ones(6))
    assert found.solution.tolist() == [1, 5, 5, 1, 0, 0]


def test_an_exact_structure_takes_and_ignores_what_iterations_are_told():
    operator = BlockDiagonal(torch.eye(3)[None] + 1, [3])
    told = operator.minimise(FIXED, torch.ones(3), start=torch.ones(3), tolerance=0.5, max_iterations=1)
    assert told.solution.equal(operator.minimise(FIXED, torch.ones(3)).solution)


def test_the_free_entries_of_the_values_do_not_count():
    operator = Diagonal(torch.ones(3))
    assert operator.minimise(FIXED, torch.tensor([1, torch.nan, torch.inf])).solution.tolist() == [1, 0, 0]
