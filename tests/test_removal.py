import pytest
import torch
from torch.testing import assert_close

from sparsekit.errors import CurvatureError
from sparsekit.linalg import BlockDiagonal, ConstrainedMinimum, Diagonal, KroneckerDiagonal
from sparsekit.problem.parameters import Mask
from sparsekit.removal import InverseFisher
from sparsekit.testing import dense_removal

WAYS = ["joint", "independent", "none"]


def problem(seed, n=12, kind="dense"):
    draw = torch.Generator().manual_seed(seed)
    if kind == "kronecker":
        left, right = (torch.linalg.qr(torch.randn(k, k, generator=draw, dtype=torch.float64)).Q for k in (3, 4))
        q = torch.rand(3, 4, generator=draw, dtype=torch.float64) + 0.05
        operator = KroneckerDiagonal([left[None], right[None]], q[None], orthogonal=True)
    else:
        A = torch.randn(n, n, generator=draw, dtype=torch.float64)
        operator = BlockDiagonal((A @ A.mT / n + 0.1 * torch.eye(n, dtype=torch.float64))[None], [n])
    weights = torch.randn(n, generator=draw, dtype=torch.float64)
    before = torch.rand(n, generator=draw) < 0.2
    chosen = (torch.rand(n, generator=draw) < 0.4) & ~before
    weights[before] = 0
    return InverseFisher(operator, 0.1), weights, Mask(~before), chosen


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("seed", range(5))
def test_what_is_removed_becomes_and_stays_zero(how, seed):
    inverse, weights, mask, chosen = problem(seed)
    after = weights + inverse.remove(weights, mask, chosen, how).delta
    assert (after[chosen | mask.removed] == 0).all()


@pytest.mark.parametrize("kind", ["dense", "kronecker"])
@pytest.mark.parametrize("seed", range(20))
def test_joint_is_never_worse(seed, kind):
    inverse, weights, mask, chosen = problem(seed, kind=kind)
    joint, independent, none = (inverse.remove(weights, mask, chosen, how).increase for how in WAYS)
    assert joint <= min(independent, none) + 1e-12


@pytest.mark.parametrize("with_gradient", [False, True], ids=["", "gradient"])
@pytest.mark.parametrize("kind", ["dense", "kronecker"])
@pytest.mark.parametrize("how", WAYS)
def test_removal_is_what_dense_algebra_gives(how, kind, with_gradient):
    inverse, weights, mask, chosen = problem(1, kind=kind)
    draw = torch.Generator().manual_seed(9)
    gradient = torch.randn(12, generator=draw, dtype=torch.float64) if with_gradient else None
    H = torch.linalg.inv(inverse.operator.dense())
    sigma = inverse.conditioned(mask).dense()
    delta, increase = dense_removal(H, weights, chosen, mask.removed, how, gradient, sigma=sigma)
    removal = inverse.remove(weights, mask, chosen, how, gradient)
    assert_close(removal.delta, delta, atol=1e-4, rtol=1e-4)  # conjugate gradients stop at 1e-4
    assert removal.increase == pytest.approx(increase, rel=1e-6)


@pytest.mark.parametrize("how", WAYS)
def test_a_scale_shrinks_the_survivors_move_alone(how):
    inverse, weights, mask, chosen = problem(4)
    whole, half = (inverse.remove(weights, mask, chosen, how, scale=s).delta for s in (1.0, 0.5))
    C = chosen | mask.removed
    assert_close(half[~C], 0.5 * whole[~C])
    assert torch.equal(half[C], whole[C])


def test_two_weights_by_hand():
    inverse = InverseFisher(BlockDiagonal(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]], dtype=torch.float64), [2]), 0.0)
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    removal = inverse.remove(weights, Mask.full(2), torch.tensor([True, False]))
    assert_close(removal.delta, torch.tensor([-1.0, 0.5], dtype=torch.float64))
    assert removal.increase == pytest.approx(0.75)


def test_on_the_identity_joint_moves_nothing_else():
    inverse = InverseFisher(Diagonal(torch.ones(4)), 0.0)
    weights = torch.tensor([1.0, -2.0, 3.0, 4.0])
    removal = inverse.remove(weights, Mask.full(4), torch.tensor([True, False, True, False]))
    assert removal.delta.tolist() == [-1.0, 0.0, -3.0, 0.0]


def test_everything_removed():
    inverse, weights, mask, _ = problem(0)
    removal = inverse.remove(weights, mask, mask.kept)
    assert_close(weights + removal.delta, torch.zeros_like(weights))


def test_a_diagonal_that_is_not_positive_ranks_nothing():
    with pytest.raises(CurvatureError, match="2 entries of 3 that are not positive"):
        InverseFisher(Diagonal(torch.tensor([1.0, -1.0, float("nan")])), 0.1).diagonal()


def test_removed_weights_cannot_be_chosen_again():
    inverse, weights, mask, _ = problem(0)
    with pytest.raises(ValueError, match="removed before"):
        inverse.remove(weights, mask, torch.ones(12, dtype=torch.bool))


@pytest.mark.parametrize("with_gradient", [False, True], ids=["", "gradient"])
@pytest.mark.parametrize("how", ["joint", "none"])
def test_an_increase_of_negative_curvature_is_an_error(how, with_gradient):
    inverse = InverseFisher(Diagonal(torch.tensor([1.0, -2.0])), 0.1)
    gradient = torch.tensor([0.0, 10.0]) if with_gradient else None
    with pytest.raises(CurvatureError, match=r"½ δᵀHδ is -2.5e-01, .* not positive definite; raise the damping"):
        inverse.remove(torch.ones(2), Mask.full(2), torch.tensor([False, True]), how, gradient)


def test_a_negative_increase_within_rounding_is_no_error():
    H = torch.tensor([[[1.0, -1.0], [-1.0, 1.0 - 1e-7]]])  # singular but for rounding
    increase = InverseFisher(BlockDiagonal(H, [2]), 0.0).increase(torch.ones(2))
    assert -1e-6 < increase < 0


class Unfinished(Diagonal):
    """A solve that ends far from the minimum."""

    def minimise(self, fixed, values, linear=None, **given):
        return ConstrainedMinimum(torch.where(fixed, values, 5.0), 3, 0.9)


@pytest.mark.parametrize("operator", [Unfinished, Diagonal])
def test_joint_says_where_it_fell_back_to_none(operator):
    chosen = torch.tensor([True, False, False])
    removal = InverseFisher(operator(torch.ones(3)), 0.1).remove(torch.ones(3), Mask.full(3), chosen)
    assert removal.delta.tolist() == [-1.0, 0.0, 0.0]
    assert removal.fell_back is (operator is Unfinished)


def test_independent_compensation_divides_by_nothing_that_is_not_positive():
    inverse = InverseFisher(Diagonal(torch.tensor([1.0, -2.0])), 0.1)
    with pytest.raises(CurvatureError, match="1 entries of 2 that are not positive"):
        inverse.remove(torch.ones(2), Mask.full(2), torch.tensor([False, True]), "independent")
