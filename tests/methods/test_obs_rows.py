import pytest
import torch
from torch.testing import assert_close

from sparsekit import CurvatureError, InverseFisher, Mask, ParameterSpace, ScoreContext
from sparsekit.linalg import (
    BlockDiagonal,
    Diagonal,
    DiagonalPlusLowRank,
    DirectSum,
    KroneckerDiagonal,
    RepeatedBlock,
    Rescaled,
    eliminate,
)
from sparsekit.methods.patterns import lowest
from sparsekit.methods.saliencies import RowSurgeon

SPACE = ParameterSpace({"conv": (3, 2, 2, 2), "linear": (4, 5), "bias": (4,)})


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(n, seed=0):
    A = draw(n, n, seed=seed)
    return A @ A.mT / n + 0.1 * torch.eye(n, dtype=torch.float64)


def kronecker(*modes, orthogonal=True, dtype=torch.float64):
    factors = [draw(1, d, d, seed=d) for d in modes]
    factors = [torch.linalg.qr(U).Q if orthogonal else U for U in factors]
    q = draw(1, *modes, seed=2).abs() + 0.1
    return KroneckerDiagonal([U.to(dtype) for U in factors], q.to(dtype), orthogonal=orthogonal)


def layers():
    return DirectSum([kronecker(3, 8), kronecker(4, 5, orthogonal=False), Diagonal(draw(4).abs() + 0.1)])


OPERATORS = {
    "one block": lambda: BlockDiagonal(spd(48)[None], [48]),
    "blocks that end inside of rows": lambda: BlockDiagonal(
        torch.stack([spd(7, seed) for seed in range(7)]), [7] * 6 + [6]
    ),
    "a direct sum of layers": layers,
    "low rank": lambda: DiagonalPlusLowRank(draw(9, 48), 0.1, 5),
    "rescaled": lambda: Rescaled(layers(), draw(48, seed=3).abs() + 0.5),
    "a diagonal": lambda: Diagonal(draw(48).abs() + 0.1),
    "rows that share a block": lambda: DirectSum(
        [RepeatedBlock(spd(8)[None], 3), RepeatedBlock(spd(5)[None], 4), Diagonal(draw(4).abs() + 0.1)]
    ),
}
FIRST = torch.ones(48, dtype=torch.bool)
SECOND = (torch.arange(48) % 3 != 1) & ~((torch.arange(48) >= 8) & (torch.arange(48) < 15))
SECOND[24:29] = False


class Context(ScoreContext):
    def __init__(self, operator, kept=FIRST, space=SPACE, weights=None):
        self._mask, self._space, self._inverse = Mask(kept), space, InverseFisher(operator, 0.1)
        self._weights = (draw(space.size, seed=5) if weights is None else weights) * kept

    weights = property(lambda self: self._weights)
    mask = property(lambda self: self._mask)
    inverse = property(lambda self: self._inverse)
    space = property(lambda self: self._space)
    units = gradient = generator = property(lambda self: pytest.fail("not needed"))


def scored(context, **settings):
    return RowSurgeon(RowSurgeon.Settings(**settings)).score(context)


def row_by_hand(H, w, left):
    """Oracle: remove the cheapest, move the others, and invert what is left anew, one weight at a time."""
    w, left, order, costs = w.clone(), list(left), [], []
    while left:
        sigma = torch.linalg.inv(H[left][:, left])
        trials = w[left] ** 2 / (2 * sigma.diagonal())
        k = int(trials.argmin())
        order.append(left[k])
        costs.append(float(trials[k]))
        w[left] -= sigma[:, k] * (w[left[k]] / sigma[k, k])
        left.pop(k)
    return order, torch.tensor(costs, dtype=torch.float64).cummax(0).values


def by_hand(H, context, longest=10**9):
    expected = torch.zeros(len(H), dtype=torch.float64)
    for info in context.space.parameters:
        for row in torch.arange(info.start, info.start + info.size).view(info.shape[0], -1):
            for piece in row.split(longest):
                left = [i for i in piece.tolist() if context.mask.kept[i]]
                order, costs = row_by_hand(H, context.weights, left)
                expected[order] = costs
    return expected


@pytest.mark.parametrize("kept", [FIRST, SECOND], ids=["first cut", "second cut"])
@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)
def test_rows_are_eliminated_one_weight_at_a_time_with_the_rest_held(make, kept):
    context = Context(make(), kept)
    assert_close(scored(context), by_hand(torch.linalg.inv(context.inverse.operator.dense()), context))


def test_long_rows_are_cut_into_pieces_with_the_rest_held():
    context = Context(layers())
    H = torch.linalg.inv(context.inverse.operator.dense())
    assert_close(scored(context, longest=3), by_hand(H, context, longest=3))


@pytest.mark.parametrize("kept", [FIRST, SECOND], ids=["first cut", "second cut"])
def test_scores_do_not_depend_on_the_rows_that_fit_the_memory(kept, monkeypatch):
    context = Context(layers(), kept)
    whole = scored(context)
    monkeypatch.setattr("sparsekit.methods.saliencies.COPIES", 2**20)
    assert_close(scored(context, slice_mebibytes=1), whole)


def test_the_slices_hold_no_more_rows_than_the_memory():
    space = ParameterSpace({"w": (64, 128)})
    surgeon = RowSurgeon(RowSurgeon.Settings(slice_mebibytes=4))
    kept = torch.rand(space.size, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, space.size)
    slices = list(surgeon._slices(space, [space.size], kept))
    assert torch.equal(torch.cat([index[index >= 0] for index in slices]).sort().values, kept.nonzero()[:, 0])
    assert all(index.shape[0] * index.shape[1] ** 2 * 8 * 4 <= 4 << 20 for index in slices if len(index) > 1)
    assert len(slices) > 2


def test_the_held_score_is_obd_where_nothing_couples():
    context = Context(Diagonal(draw(48).abs() + 0.1))
    expected = 0.5 * context.weights.square() * context.inverse.operator.inverse_diagonal()
    assert_close(scored(context), expected)


def test_equal_weights_go_by_index_and_each_of_a_row_at_a_cost_of_its_own():
    space = ParameterSpace({"w": (2, 6)})
    context = Context(BlockDiagonal(torch.eye(6).repeat(2, 1, 1), [6, 6]), FIRST[:12], space, torch.ones(12))
    scores = scored(context)
    assert bool((scores.view(2, 6).diff(dim=1) > 0).all())
    assert lowest(scores, FIRST[:12], 4).nonzero()[:, 0].tolist() == [0, 1, 6, 7]


def test_zero_weights_go_first_and_are_not_mistaken_for_removed_ones():
    weights = draw(48, seed=5)
    weights[[9, 26]] = 0.0
    scores = scored(Context(layers(), weights=weights))
    assert set(scores.argsort()[:2].tolist()) == {9, 26}


def test_single_and_double_precision_choose_alike():
    space = ParameterSpace({"w": (6, 40)})
    contexts = [
        Context(kronecker(6, 40, dtype=dtype), torch.ones(240, dtype=torch.bool), space)
        for dtype in (torch.float32, torch.float64)
    ]
    single, double = (scored(context) for context in contexts)
    assert_close(single, double, rtol=1e-3, atol=1e-6)
    for count in (24, 120, 216):
        chosen = [set(scores.argsort(stable=True)[:count].tolist()) for scores in (single, double)]
        assert chosen[0] == chosen[1]


def test_a_row_that_is_not_positive_definite_is_refused():
    matrix = torch.eye(48, dtype=torch.float64)
    matrix[30, 31] = matrix[31, 30] = 2.0
    context = Context(BlockDiagonal(matrix[None], [48]))
    with pytest.raises(CurvatureError, match="1 of 4 curvature blocks are not positive definite.*raise the damping"):
        scored(context, longest=8)


def test_elimination_leaves_its_weights_and_mask_alone():
    weights, kept = draw(3, 100), torch.ones(3, 100, dtype=torch.bool)
    given = weights.clone()
    eliminate(torch.stack([torch.linalg.inv(spd(100, seed)) for seed in range(3)]), weights, kept)
    assert torch.equal(weights, given) and bool(kept.all())
