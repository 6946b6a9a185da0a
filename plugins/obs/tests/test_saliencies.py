from itertools import combinations

import pytest
import torch
from torch.testing import assert_close

from sparsekit import CurvatureError, InverseFisher, Mask, ParameterSpace, ScoreContext, SettingsError
from sparsekit.linalg import BlockDiagonal, DiagonalPlusLowRank, KroneckerDiagonal, LinearOperator, eliminate
from sparsekit.methods.patterns import NM, Block
from sparsekit_obs.saliencies import GreedySurgeon, GroupSurgeon, cheapest


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(n, seed=0):
    A = draw(n, n, seed=seed)
    return A @ A.mT / n + 0.1 * torch.eye(n, dtype=torch.float64)


def dense(n, seed=0):
    return BlockDiagonal(spd(n, seed)[None], [n])


class Context(ScoreContext):
    def __init__(self, operator, kept=None, units=None, seed=5):
        n = operator.size
        self._mask = Mask(torch.ones(n, dtype=torch.bool) if kept is None else kept)
        self._weights = draw(n, seed=seed) * self._mask.kept
        self._inverse, self._units = InverseFisher(operator, 0.1), units

    weights = property(lambda self: self._weights)
    mask = property(lambda self: self._mask)
    inverse = property(lambda self: self._inverse)
    units = property(lambda self: self._units)
    gradient = generator = property(lambda self: pytest.fail("not needed"))


def greedy_by_hand(H, w, gone, count):
    """Oracle: one weight at a time, each the cheapest to remove with all that went before, solved anew."""
    taken, costs, before = list(gone), [], 0.0
    for _ in range(count):
        trials = {}
        for i in range(len(w)):
            if i not in taken:
                trials[i] = constrained(H, w, [*taken, i])
        best = min(trials, key=trials.get)
        costs.append(trials[best] - before)
        before = trials[best]
        taken.append(best)
    return taken[len(gone) :], costs


def constrained(H, w, C):
    """½ δᵀHδ at the minimum over δ with δ_C = −w_C."""
    S = [i for i in range(len(w)) if i not in C]
    delta = torch.zeros_like(w)
    delta[C] = -w[C]
    if S:
        delta[S] = -torch.linalg.solve(H[S][:, S], H[S][:, C] @ delta[C])
    return float(0.5 * delta @ H @ delta)


@pytest.mark.parametrize("gone", [(), (1, 4)], ids=["first cut", "second cut"])
@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_greedy_equals_exhaustive_search_for_one_weight_at_a_time(n, gone):
    gone = [i for i in gone if i < n]
    kept = torch.tensor([i not in gone for i in range(n)])
    context = Context(dense(n), kept)
    scores = GreedySurgeon(GreedySurgeon.Settings(block_size=100)).score(context)
    order, costs = greedy_by_hand(spd(n), context.weights, gone, n - len(gone))
    expected = torch.zeros(n, dtype=torch.float64)
    expected[order] = torch.tensor(costs, dtype=torch.float64).cummax(0).values if order else expected[order]
    assert_close(scores, expected)


def test_the_greedy_costs_of_a_set_add_up_to_its_joint_removal():
    context = Context(dense(12))
    order, costs = greedy_by_hand(spd(12), context.weights, [], 5)
    chosen = torch.zeros(12, dtype=torch.bool)
    chosen[order] = True
    joint = context.inverse.remove(context.weights, context.mask, chosen)
    assert sum(costs) == pytest.approx(joint.increase)


def test_blocks_do_not_see_one_another():
    blocks = BlockDiagonal(torch.stack([spd(4, 1), spd(4, 2)]), [4, 3])
    scores = GreedySurgeon(GreedySurgeon.Settings()).score(Context(blocks))
    alone = GreedySurgeon(GreedySurgeon.Settings()).score(Context(BlockDiagonal(spd(4, 1)[None], [4])))
    assert_close(scores[:4], alone)


@pytest.mark.parametrize(
    "operator",
    [
        DiagonalPlusLowRank(draw(5, 12), 0.1, 5),
        KroneckerDiagonal(
            [torch.linalg.qr(draw(1, d, d)).Q for d in (3, 4)], draw(1, 3, 4).abs() + 0.1, orthogonal=True
        ),
    ],
    ids=["low rank", "kronecker"],
)
@pytest.mark.parametrize("kept", [torch.ones(12, dtype=torch.bool), torch.arange(12) % 4 != 1], ids=["", "second cut"])
def test_greedy_takes_any_operator(operator, kept):
    context = Context(operator, kept)
    scores = GreedySurgeon(GreedySurgeon.Settings(block_size=12)).score(context)
    gone = (~kept).nonzero()[:, 0].tolist()
    order, costs = greedy_by_hand(torch.linalg.inv(operator.dense()), context.weights, gone, 4)
    ranked = torch.where(kept, scores, torch.inf).argsort(stable=True)[:4].tolist()
    assert set(ranked) == set(order)
    assert_close(scores[order], torch.tensor(costs, dtype=torch.float64).cummax(0).values)


def units(pattern, n, rows=1):
    return pattern.units(ParameterSpace({"w": (rows, n // rows)}))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_n_of_m_takes_the_cheapest_subset_of_all(n, m):
    size = 2 * m
    context = Context(dense(size), units=units(NM(NM.Settings(n=n, m=m)), size))
    scores = GroupSurgeon(None).score(context)
    H = spd(size)
    for start in (0, m):
        subsets = combinations(range(start, start + m), m - n)
        best = min(subsets, key=lambda T: constrained(H, context.weights, list(T)))
        group = scores[start : start + m]
        assert set(group.argsort()[: m - n].add(start).tolist()) == set(best)
        assert float(group.sort().values[: m - n].sum()) == pytest.approx(constrained(H, context.weights, list(best)))


def test_a_blocks_scores_add_up_to_the_cost_of_the_block():
    context = Context(dense(12), units=units(Block(Block.Settings(size=4)), 12))
    scores = GroupSurgeon(None).score(context)
    for start in (0, 4, 8):
        group = list(range(start, start + 4))
        assert float(scores[group].sum()) == pytest.approx(constrained(spd(12), context.weights, group))


def test_what_is_gone_belongs_to_the_subset():
    kept = torch.tensor([True, False, True, True, True, True, True, False])
    context = Context(dense(8), kept, units=units(NM(NM.Settings(n=2, m=4)), 8))
    scores = GroupSurgeon(None).score(context)
    H, w = spd(8), context.weights
    gone = [1, 7]
    for group, was in ((range(4), 1), (range(4, 8), 7)):
        others = [i for i in group if i != was]
        best = min(others, key=lambda i: constrained(H, w, [i, *gone]))
        assert min(others, key=lambda i: float(scores[i])) == best


def test_large_groups_are_searched_greedily():
    sigma, w = torch.linalg.inv(spd(16))[None], draw(1, 16, seed=3)
    cost, members = cheapest(sigma, w, torch.ones(1, 16, dtype=torch.bool), 8)
    order, _ = greedy_by_hand(spd(16), w[0], [], 8)
    assert set(members[0].tolist()) == set(order)
    assert float(cost) == pytest.approx(constrained(spd(16), w[0], order))


def test_groups_need_a_pattern_that_has_them():
    with pytest.raises(SettingsError, match="--pattern n:m or block"):
        GroupSurgeon(None).score(Context(dense(4)))


def test_the_operators_default_blocks_are_enough():
    class Plain(LinearOperator):
        def __init__(self):
            super().__init__(6, torch.float64, torch.device("cpu"))

        def _matmul(self, X):
            return torch.linalg.solve(spd(6), X)

        def _solve(self, B):
            return spd(6) @ B

        def diagonal(self):
            return torch.linalg.inv(spd(6)).diagonal()

        def inverse_diagonal(self):
            return spd(6).diagonal()

    made, exact = (GreedySurgeon(GreedySurgeon.Settings()).score(Context(o)) for o in (Plain(), dense(6)))
    assert_close(made, exact)


INDEFINITE = {
    "negative": [[1.0, 2.0], [2.0, 1.0]],
    "zero": [[0.0, 0.0], [0.0, 1.0]],
    "not a number": [[float("nan"), 0.0], [0.0, 1.0]],
}


@pytest.mark.parametrize("case", INDEFINITE)
def test_greedy_elimination_takes_no_pivot_that_is_not_positive(case):
    sigma = torch.tensor([INDEFINITE[case]], dtype=torch.float64)
    with pytest.raises(CurvatureError, match="1 of 1 blocks .* not positive definite.*raise the damping"):
        eliminate(sigma, torch.tensor([[1.0, 3.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize("zeros", [1, 20, 64])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_elimination_takes_no_weight_twice_where_pivots_are_zero(zeros, seed):
    draw = torch.Generator().manual_seed(seed)
    diagonal = torch.rand(2, 64, generator=draw, dtype=torch.float64) + 0.1
    diagonal[1, torch.randperm(64, generator=draw)[:zeros]] = 0.0
    weights, kept = torch.randn(2, 64, generator=draw, dtype=torch.float64), torch.ones(2, 64, dtype=torch.bool)
    with pytest.raises(CurvatureError, match="1 of 2 blocks .* not positive definite"):
        eliminate(torch.diag_embed(diagonal), weights, kept)


@pytest.mark.parametrize("case", INDEFINITE)
def test_a_group_whose_block_is_not_positive_definite_has_no_cost(case):
    sigma = torch.tensor([INDEFINITE[case]], dtype=torch.float64)
    with pytest.raises(CurvatureError, match="1 of 1 blocks .* not positive definite.*raise the damping"):
        cheapest(sigma, torch.tensor([[1.0, 3.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool), 2)


def test_in_long_blocks_what_is_taken_is_put_aside_without_changing_anything():
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(2, 150, 200, generator=draw, dtype=torch.float64)
    H = root @ root.mT / 200 + 0.1 * torch.eye(150, dtype=torch.float64)
    weights, kept = torch.randn(2, 150, generator=draw, dtype=torch.float64), torch.ones(2, 150, dtype=torch.bool)
    kept[1, ::3] = False
    weights *= kept
    costs = eliminate(torch.linalg.inv(H), weights, kept)
    for b in range(2):
        left = kept[b].clone()
        for _ in range(60):  # by the definition: the cheapest of those left, with the others moved
            sigma = torch.linalg.inv(H[b][left][:, left])
            gone = kept[b] & ~left
            w = weights[b][left] + torch.linalg.solve(H[b][left][:, left], H[b][left][:, gone] @ weights[b][gone])
            least = left.nonzero()[(w.square() / sigma.diagonal()).argmin(), 0]
            left[least] = False
            cheapest = costs[b].masked_fill(~kept[b] | (kept[b] & ~left), torch.inf)
            cheapest[least] = costs[b, least]
            assert int(cheapest.argmin()) == int(least)
