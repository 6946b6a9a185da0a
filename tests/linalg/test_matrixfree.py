import pytest
import torch
from torch.testing import assert_close

from sparsekit.errors import CurvatureError
from sparsekit.linalg import BlockDiagonal, Diagonal, MatrixFree
from sparsekit.testing import dense_removal

N = 12


@pytest.fixture
def H():
    A = torch.randn(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return A @ A.mT / N + 0.1 * torch.eye(N, dtype=torch.float64)


def operator(H, approximation=None, **kwargs):
    return MatrixFree(lambda v: H @ v, approximation or Diagonal(1 / H.diagonal()), **kwargs)


def cut(seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(N, generator=draw) < 0.5, torch.randn(N, generator=draw, dtype=torch.float64)


def test_products_and_solves(H):
    exact, X = operator(H, tolerance=1e-12), torch.randn(N, 3, dtype=torch.float64)
    assert_close(exact.solve(X), H @ X)
    assert_close(exact @ X, torch.linalg.solve(H, X))


@pytest.mark.parametrize("with_linear", [False, True])
def test_constrained_minimum(H, with_linear):
    fixed, weights = cut()
    linear = torch.randn(N, dtype=torch.float64) if with_linear else None
    found = operator(H, tolerance=1e-12).minimise(fixed, -weights, linear).solution
    none = torch.zeros(N, dtype=torch.bool)
    assert_close(found, dense_removal(H, weights, fixed, none, "joint", linear)[0])


def test_an_unfinished_minimum_lies_between_the_approximations_and_the_exact_one(H):
    fixed, weights = cut()

    def value(x):
        return float(x @ H @ x) / 2

    approximation = Diagonal(1 / H.diagonal())
    rough = value(approximation.minimise(fixed, -weights).solution)
    unfinished = operator(H, approximation, max_iterations=2).minimise(fixed, -weights)
    exact = value(operator(H, tolerance=1e-12).minimise(fixed, -weights).solution)
    assert exact < value(unfinished.solution) < rough
    assert unfinished.iterations == 2 and unfinished.residual > 1e-4


def test_a_perfect_approximation_needs_no_iteration(H):
    fixed, weights = cut()
    assert operator(H, BlockDiagonal(H[None], [N])).minimise(fixed, -weights).iterations == 0


def test_a_product_that_is_not_reached_is_an_error(H):
    with pytest.raises(CurvatureError, match="stopped after 2 iterations"):
        operator(H, max_iterations=2) @ torch.ones(N, dtype=torch.float64)
