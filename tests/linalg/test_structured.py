import pytest
import torch
from torch.testing import assert_close

from sparsekit.errors import CurvatureError
from sparsekit.linalg import BlockDiagonal, Diagonal, DirectSum, KroneckerDiagonal, Principal


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(n, seed=0):
    A = draw(n, n, seed=seed)
    return A @ A.mT / n + 0.1 * torch.eye(n, dtype=torch.float64)


def blocks():
    return BlockDiagonal(torch.stack([spd(4, 1), spd(4, 2), spd(4, 3)]), [4, 4, 2])


def kronecker(orthogonal=True):
    left, right = draw(3, 3), draw(4, 4, seed=1)
    if orthogonal:
        left, right = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q
    return KroneckerDiagonal(left, right, draw(3, 4, seed=2).abs() + 0.1, orthogonal=orthogonal)


CASES = {
    "diagonal": lambda: Diagonal(draw(6).abs() + 0.1),
    "blocks": blocks,
    "blocks of one": lambda: BlockDiagonal(draw(5, 1, 1).abs() + 0.1, [1] * 5),
    "one block": lambda: BlockDiagonal(spd(7)[None], [7]),
    "kronecker": kronecker,
    "kronecker, oblique": lambda: kronecker(False),
    "direct sum": lambda: DirectSum([kronecker(), blocks(), Diagonal(draw(3).abs() + 0.1)]),
}
FIXED = {"nothing": 0.0, "few": 0.2, "half": 0.5, "most": 0.8, "all": 1.0}


@pytest.fixture(params=CASES, ids=str)
def operator(request):
    return CASES[request.param]()


def dense(operator):
    return operator @ torch.eye(operator.size, dtype=torch.float64)


def kkt(H, c, fixed, values):
    """Oracle: min cᵀx + ½xᵀHx with x_C given, as one linear system with multipliers."""
    n, C = len(H), fixed.nonzero()[:, 0]
    E = torch.eye(n, dtype=H.dtype)[C]
    system = torch.cat([torch.cat([H, E.mT], 1), torch.cat([E, torch.zeros(len(C), len(C), dtype=H.dtype)], 1)])
    return torch.linalg.solve(system, torch.cat([-c, values[C]]))[:n]


def test_symmetric_and_positive_definite(operator):
    matrix = dense(operator)
    assert_close(matrix, matrix.mT)
    assert torch.linalg.eigvalsh(matrix).min() > 0


def test_solve_is_the_inverse(operator):
    X = draw(operator.size, 3)
    assert_close(operator.solve(operator @ X), X)


def test_vectors_and_columns_agree(operator):
    v = draw(operator.size)
    assert_close(operator @ v, (operator @ v[:, None])[:, 0])


def test_diagonal(operator):
    assert_close(operator.diagonal(), dense(operator).diagonal())


def test_inverse_diagonal(operator):
    assert_close(operator.inverse_diagonal(), torch.linalg.inv(dense(operator)).diagonal())


@pytest.mark.parametrize("part", FIXED, ids=str)
@pytest.mark.parametrize("linear", [False, True], ids=["", "linear"])
def test_minimise_is_the_constrained_minimum(operator, part, linear):
    n = operator.size
    fixed = torch.rand(n, generator=torch.Generator().manual_seed(4)) < FIXED[part]
    c = draw(n, seed=5) if linear else torch.zeros(n, dtype=torch.float64)
    found = operator.minimise(fixed, draw(n, seed=6), c if linear else None, tolerance=1e-10)
    truth = kkt(torch.linalg.inv(dense(operator)), c, fixed, draw(n, seed=6))
    assert_close(found.solution, truth, atol=1e-7, rtol=1e-6)  # conjugate gradients to 1e-10


def test_a_start_does_not_change_the_minimum(operator):
    fixed = torch.arange(operator.size) % 3 == 0
    values = draw(operator.size)
    cold = operator.minimise(fixed, values, tolerance=1e-10).solution
    assert_close(
        operator.minimise(fixed, values, start=draw(operator.size, seed=9), tolerance=1e-10).solution,
        cold,
        atol=1e-7,
        rtol=1e-6,
    )


@pytest.mark.parametrize("name", ["diagonal", "blocks", "blocks of one"])
def test_conditional_diagonal_is_exact_where_it_can_be(name):
    operator = CASES[name]()
    kept = torch.arange(operator.size) % 3 != 1
    H = torch.linalg.inv(dense(operator))
    truth = torch.zeros(operator.size, dtype=torch.float64)
    truth[kept] = torch.linalg.inv(H[kept][:, kept]).diagonal()
    assert_close(operator.conditional_diagonal(kept), truth)


def test_conditional_diagonal_is_an_upper_bound(operator):
    kept = torch.arange(operator.size) % 3 != 1
    H = torch.linalg.inv(dense(operator))
    truth = torch.linalg.inv(H[kept][:, kept]).diagonal()
    assert (operator.conditional_diagonal(kept)[kept] >= truth - 1e-9).all()


def test_principal_part_couples_nothing_outside():
    kept = torch.arange(12) % 4 != 0
    matrix = dense(Principal(kronecker(), kept))
    assert_close(matrix[kept][:, kept], dense(kronecker())[kept][:, kept])
    assert (matrix[kept][:, ~kept] == 0).all()


def test_principal_part_minimises_with_products_alone():
    operator = Principal(kronecker(), torch.arange(12) % 4 != 0)
    fixed, values = torch.arange(12) % 4 < 2, draw(12)
    truth = kkt(torch.linalg.inv(dense(operator)), torch.zeros(12, dtype=torch.float64), fixed, values)
    assert_close(operator.minimise(fixed, values, tolerance=1e-10).solution, truth, atol=1e-7, rtol=1e-6)


def test_a_wrong_shape_is_refused(operator):
    with pytest.raises(ValueError, match="was needed"):
        operator @ draw(operator.size + 1)


def test_a_block_that_is_not_positive_definite_is_refused():
    with pytest.raises(CurvatureError, match="1 of 2 curvature blocks are not positive definite"):
        BlockDiagonal(torch.stack([spd(3), -spd(3)]), [3, 3])


def test_no_convergence_is_an_error():
    left = torch.linalg.qr(draw(8, 8)).Q
    operator = KroneckerDiagonal(left, left, torch.logspace(-8, 8, 64, dtype=torch.float64).view(8, 8), orthogonal=True)
    with pytest.raises(CurvatureError, match="raise the damping"):
        operator.minimise(torch.arange(64) % 2 == 0, draw(64), max_iterations=2)
