import math

import pytest
import torch
from torch.testing import assert_close

from sparsekit.errors import CurvatureError
from sparsekit.linalg import (
    BlockDiagonal,
    Diagonal,
    DiagonalPlusLowRank,
    DirectSum,
    KroneckerDiagonal,
    Principal,
    RepeatedBlock,
    Rescaled,
)
from sparsekit.linalg.iterative import ConjugateGradients


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
    return KroneckerDiagonal([left[None], right[None]], draw(1, 3, 4, seed=2).abs() + 0.1, orthogonal=orthogonal)


def tensor(factored=(True, True, True), outer=False):
    """Two groups of arrays (2, 3, 4)."""
    factors = [draw(2, d, d, seed=d) if known else None for d, known in zip((2, 3, 4), factored, strict=True)]
    scale = draw(2, 2, 3, 4, seed=8).abs() + 0.5 if outer else None
    return KroneckerDiagonal(factors, draw(2, 2, 3, 4, seed=9).abs() + 0.1, outer=scale, orthogonal=False)


def low_rank(r=4, n=9, damping=0.1, **more):
    return DiagonalPlusLowRank(draw(r, n), damping, 5, **more)


def repeated(kept=None, **more):
    return RepeatedBlock(torch.stack([spd(3, 1), spd(3, 2)]), 4, kept, **more)


THIRD = torch.arange(24) % 3 != 0

CASES = {
    "diagonal": lambda: Diagonal(draw(6).abs() + 0.1),
    "blocks": blocks,
    "blocks of one": lambda: BlockDiagonal(draw(5, 1, 1).abs() + 0.1, [1] * 5),
    "one block": lambda: BlockDiagonal(spd(7)[None], [7]),
    "kronecker": kronecker,
    "kronecker, oblique": lambda: kronecker(False),
    "kronecker, three modes in groups": tensor,
    "kronecker, outer diagonal": lambda: tensor(outer=True),
    "kronecker, first mode the identity": lambda: tensor((False, True, True)),
    "kronecker, other modes the identity": lambda: tensor((True, False, False), outer=True),
    "rescaled": lambda: Rescaled(blocks(), draw(10, seed=5).abs() + 0.5),
    "kronecker, one mode": lambda: KroneckerDiagonal([draw(2, 3, 3)], draw(2, 3).abs() + 0.1, orthogonal=False),
    "kronecker, three modes": lambda: KroneckerDiagonal(
        [draw(1, d, d, seed=d) for d in (2, 3, 4)], draw(1, 2, 3, 4).abs() + 0.1, orthogonal=False
    ),
    "direct sum": lambda: DirectSum([kronecker(), blocks(), Diagonal(draw(3).abs() + 0.1), low_rank(2, 3)]),
    "low rank": low_rank,
    "low rank, more rows than columns": lambda: low_rank(12, 5),
    "low rank, hardly damped": lambda: low_rank(damping=1e-6),
    "low rank, some columns": lambda: low_rank(kept=torch.arange(9) % 3 != 0),
    "repeated block": repeated,
    "repeated block, some coordinates": lambda: repeated(THIRD),
    "repeated block, in slices": lambda: repeated(THIRD, slice_bytes=1),
}
EXACT = [name for name in CASES if "kronecker" not in name and "sum" not in name]
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


@pytest.mark.parametrize("name", EXACT)
def test_the_conditioned_diagonal_is_exact_where_it_can_be(name):
    operator = CASES[name]()
    kept = torch.arange(operator.size) % 3 != 1
    H = torch.linalg.inv(dense(operator))
    truth = torch.zeros(operator.size, dtype=torch.float64)
    truth[kept] = torch.linalg.inv(H[kept][:, kept]).diagonal()
    assert_close(torch.where(kept, operator.conditioned(kept).diagonal(), 0.0), truth)


def test_the_conditioned_diagonal_is_an_upper_bound(operator):
    kept = torch.arange(operator.size) % 3 != 1
    H = torch.linalg.inv(dense(operator))
    truth = torch.linalg.inv(H[kept][:, kept]).diagonal()
    assert (operator.conditioned(kept).diagonal()[kept] >= truth * (1 - 1e-7)).all()


@pytest.mark.parametrize("name", EXACT)
def test_a_conditioned_operator_is_the_inverse_of_the_kept_part(name):
    operator = CASES[name]()
    kept = torch.arange(operator.size) % 3 != 1
    matrix, H = dense(operator.conditioned(kept)), torch.linalg.inv(dense(operator))
    assert_close(matrix[kept][:, kept], torch.linalg.inv(H[kept][:, kept]))
    assert_close(matrix[kept][:, ~kept], torch.zeros_like(matrix[kept][:, ~kept]))


def test_conditioning_twice_is_conditioning_on_both():
    for operator in (low_rank(), repeated()):
        one, other = torch.arange(operator.size) % 3 != 1, torch.arange(operator.size) % 4 != 2
        twice, both = operator.conditioned(one).conditioned(other), operator.conditioned(one & other)
        assert_close(dense(twice), dense(both))


def test_blocks_are_principal_blocks(operator):
    n = operator.size
    index = torch.randperm(n, generator=torch.Generator().manual_seed(3))[: n // 2 * 2].view(2, -1)
    truth = dense(operator)[index[:, :, None], index[:, None, :]]
    assert_close(operator.blocks(index), truth)


def test_short_groups_are_padded_with_the_identity(operator):
    found = operator.blocks(torch.tensor([[1, 3, -1], [2, -1, -1]]))
    matrix = dense(operator)
    assert_close(found[0, :2, :2], matrix[[1, 3]][:, [1, 3]])
    assert_close(found[1, 0, 0], matrix[2, 2])
    assert_close(found[:, 2], torch.eye(3, dtype=torch.float64)[2].expand(2, 3))


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_blocks_of_the_precision_are_principal_blocks(operator, padded):
    H = torch.linalg.inv(dense(operator))
    index = torch.stack([torch.arange(operator.size)[start : start + 3] for start in range(operator.size - 2)])
    pad = torch.full((len(index), 1), -1)
    found = operator.inverse_blocks(torch.cat([index, pad], 1) if padded else index)
    truth = torch.stack([H[group][:, group] for group in index])
    assert_close(found[:, :3, :3], truth)
    assert_close(operator.conditioned_blocks(index), torch.linalg.inv(truth))
    if padded:
        assert_close(found[:, 3], torch.tensor([0.0, 0.0, 0.0, 1.0]).to(found).expand(len(index), -1))
        both = operator.conditioned_blocks(torch.cat([index, pad], 1))
        assert_close(both[:, :3, :3], torch.linalg.inv(truth))
        assert_close(both[:, 3], found[:, 3])


ROWS = {
    "kronecker": (kronecker, 4),
    "kronecker, oblique": (lambda: kronecker(False), 4),
    "kronecker, three modes in groups": (tensor, 12),
    "kronecker, outer diagonal": (lambda: tensor(outer=True), 12),
    "kronecker, first mode the identity": (lambda: tensor((False, True, True)), 12),
    "kronecker, second mode the identity": (lambda: tensor((True, False, True)), 12),
    "kronecker, other modes the identity": (lambda: tensor((True, False, False), outer=True), 12),
    "rescaled": (lambda: Rescaled(kronecker(), draw(12, seed=5).abs() + 0.5), 4),
    "direct sum": (lambda: DirectSum([kronecker(), kronecker(False)]), 4),
    "repeated block": (repeated, 3),
    "low rank": (low_rank, 3),
}


@pytest.mark.parametrize("case", ROWS)
def test_whole_rows_are_conditioned_as_their_blocks_of_the_precision_say(case):
    make, width = ROWS[case]
    operator = make()
    H = torch.linalg.inv(dense(operator))
    index = torch.arange(operator.size).view(-1, width)
    for some in (index, index[1:], index[:1], index.flip(0)):
        truth = torch.stack([torch.linalg.inv(H[row][:, row]) for row in some])
        assert_close(operator.conditioned_blocks(some), truth)


def test_rows_are_conditioned_in_double_precision_where_single_would_not_do():
    factors = [torch.linalg.qr(draw(1, d, d, seed=d)).Q.float() for d in (3, 8)]
    for spread, kind in ((1e2, torch.float32), (1e7, torch.float64)):
        q = torch.logspace(0, math.log10(spread), 8).repeat(1, 3, 1)
        operator = KroneckerDiagonal(factors, q, orthogonal=True)
        assert operator.conditioned_blocks(torch.arange(24).view(3, 8)).dtype == kind


def test_blocks_of_a_precision_known_by_solves_are_refused_where_there_are_too_many():
    n = 20_001
    operator = Principal(Diagonal(torch.ones(n)), torch.ones(n, dtype=torch.bool))
    with pytest.raises(CurvatureError, match=r"a solve for each of its 20,001 coordinates.*20,000 at most; use"):
        operator.inverse_blocks(torch.tensor([[0, 1]]))


def test_stretches_do_not_couple(operator):
    matrix, lengths = dense(operator), operator.stretches()
    stretch = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    assert len(stretch) == operator.size
    assert_close(matrix * (stretch[:, None] != stretch), torch.zeros_like(matrix))


def test_pages_change_nothing(monkeypatch):
    whole = dense(low_rank())
    monkeypatch.setattr("sparsekit.linalg.lowrank.PAGE_BYTES", 2 * 8 * 4)  # two columns a page
    monkeypatch.setattr("sparsekit.linalg.lowrank.TILE", 3)  # of four rows
    assert_close(dense(low_rank()), whole)
    assert_close(low_rank().diagonal(), whole.diagonal())


def test_a_diagonal_that_is_changed_by_its_caller_is_made_from_the_operator_again():
    operator = DiagonalPlusLowRank(draw(5, 9), 0.1, 5)
    expected = operator.dense().diagonal()
    operator.diagonal().zero_()
    torch.testing.assert_close(operator.diagonal(), expected)


@pytest.mark.parametrize("kept", [None, torch.arange(9) % 4 != 0], ids=["all", "kept"])
@pytest.mark.parametrize("cell", [(3, 2), (1, 9), (4, 4), (64, 4096)], ids=str)
def test_cells_of_products_change_nothing(cell, kept, monkeypatch):
    monkeypatch.setattr("sparsekit.linalg.lowrank.CELL", cell)
    rows = (draw(4, 9) * 1e3).float()  # beyond what float32 is used for
    mine = rows.double() if kept is None else rows.double() * kept
    H = mine.mT @ mine / 5 + 0.1 * torch.eye(9)
    operator, v = DiagonalPlusLowRank(rows, 0.1, 5, kept=kept), draw(9, 2)
    assert_close((operator @ v.float()).double(), torch.linalg.solve(H, v.float().double()), rtol=1e-5, atol=1e-5)


def test_single_precision_rows_keep_their_digits_at_small_damping():
    # The published form, V kept in float32, gives errors of 15 and negative entries here.
    n, spectrum = 50, torch.logspace(0, -8, 50, dtype=torch.float64)
    rows = draw(200, n) @ torch.diag(spectrum.sqrt()) @ torch.linalg.qr(draw(n, n, seed=8)).Q
    truth = torch.linalg.inv(rows.float().double().mT @ rows.float().double() / 200 + 1e-7 * torch.eye(n))
    operator = DiagonalPlusLowRank(rows.float(), 1e-7, 200)
    assert_close(operator.diagonal().double(), truth.diagonal(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("damping", [1e-7, 1e-5, 1e-3], ids=str)
def test_single_precision_products_keep_their_digits(damping):
    n, spectrum = 300, torch.logspace(0, -6, 300, dtype=torch.float64)
    rows = (draw(40, n) @ torch.diag(spectrum.sqrt()) @ torch.linalg.qr(draw(n, n, seed=8)).Q).float()
    H = rows.double().mT @ rows.double() / 40 + damping * torch.eye(n)
    operator, v = DiagonalPlusLowRank(rows, damping, 40), draw(n, seed=2)

    def apart(found, truth):
        error = found.double() - truth
        return float((error @ H @ error / (truth @ H @ truth)).sqrt())

    assert apart(operator @ v.float(), torch.linalg.solve(H, v)) < 1e-3
    assert_close(operator.solve(v.float()).double(), H @ v, rtol=1e-4, atol=1e-4 * float((H @ v).abs().max()))
    fixed = torch.arange(n) % 3 == 0
    truth = kkt(H, torch.zeros_like(v), fixed, v)
    assert apart(operator.minimise(fixed, v.float()).solution, truth) < 1e-3


@pytest.mark.parametrize("how", ["product", "linear term"])
@pytest.mark.parametrize("damping", [1e-8, 1e-6, 1e-4, 1e-2], ids=str)  # tr F/γ is about 1e0 to 1e8
def test_vectors_in_the_span_of_single_precision_rows_keep_their_digits(damping, how):
    n, r = 200, 20
    rows = (draw(r, n) * torch.logspace(0, -3, n, dtype=torch.float64)).float()
    H = rows.double().mT @ rows.double() / r + damping * torch.eye(n)
    v = (draw(r, seed=3).float() @ rows).double()
    operator, nothing = DiagonalPlusLowRank(rows, damping, r), torch.zeros(n, dtype=torch.bool)
    zeros = torch.zeros(n)
    found = operator @ v.float() if how == "product" else -operator.minimise(nothing, zeros, v.float()).solution
    error = found.double() - torch.linalg.solve(H, v)
    assert float((error @ H @ error / (v @ torch.linalg.solve(H, v))).sqrt()) < 1e-3


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
        BlockDiagonal(torch.stack([spd(3), -spd(3)]), [3, 3]).diagonal()


def raised(make, damping):
    """The damping that the error names, added to the one that failed."""
    with pytest.raises(CurvatureError, match="raise the damping by at least") as refused:
        make(damping).diagonal()
    return damping + float(str(refused.value).split("by at least ")[1].split(",")[0])


@pytest.mark.parametrize("bad", [spd(4, 1) - 3 * torch.eye(4), torch.diag(draw(4).abs()).masked_fill(THIRD[:4], 0)])
@pytest.mark.parametrize("damping", [0.0, 1e-16])
def test_the_damping_that_a_block_lacks_is_enough(bad, damping):
    def make(gamma):
        return BlockDiagonal(torch.stack([spd(4), bad.double()]) + gamma * torch.eye(4), [4, 4])

    assert bool((make(raised(make, damping)).diagonal() > 0).all())


def test_the_damping_that_a_block_in_single_precision_lacks_is_enough():
    ones = torch.ones(1, 30, 30)

    def make(gamma):
        return BlockDiagonal(ones + gamma * torch.eye(30), [30])

    assert bool((make(raised(make, 0.0)).diagonal() > 0).all())


def test_the_damping_that_rows_lack_is_enough():
    rows = draw(1, 50).repeat(20, 1) * 1e3

    def make(gamma):
        return DiagonalPlusLowRank(rows, gamma, 20)

    assert bool(make(raised(make, 1e-12)).diagonal().isfinite().all())


def test_a_block_that_is_not_finite_needs_no_damping():
    with pytest.raises(CurvatureError, match="not finite: check the data"):
        BlockDiagonal(torch.full((1, 2, 2), torch.nan), [2]).diagonal()


def test_small_blocks_do_not_look_small_beside_their_padding():
    tiny = BlockDiagonal(1e-13 * spd(3)[None], [2])
    kept = torch.tensor([True, False])
    assert_close(1e-13 * tiny.inverse[0, :2, :2], torch.linalg.inv(spd(3)[:2, :2]))
    assert_close(1e-13 * tiny.conditioned(kept).diagonal()[0], 1 / spd(3)[0, 0])
    found = tiny.minimise(~kept, torch.ones(2, dtype=torch.float64)).solution
    assert_close(found[0], -spd(3)[0, 1] / spd(3)[0, 0])


def test_rows_that_are_not_finite_are_refused():
    with pytest.raises(CurvatureError, match="Gram matrix of 2 gradient rows is not positive definite"):
        DiagonalPlusLowRank(torch.full((2, 3), torch.nan), 0.1, 2).diagonal()


def test_no_convergence_is_an_error():
    left = torch.linalg.qr(draw(8, 8)).Q
    operator = KroneckerDiagonal(
        [left[None]] * 2, torch.logspace(-8, 8, 64, dtype=torch.float64).view(1, 8, 8), orthogonal=True
    )
    with pytest.raises(CurvatureError, match="raise the damping"):
        operator.minimise(torch.arange(64) % 2 == 0, draw(64), max_iterations=2)


@pytest.mark.parametrize("q", [[3.0, -1.0], [-1.0, -3.0]], ids=["indefinite", "negative"])
def test_a_principal_part_that_cannot_be_solved_is_an_error(q):
    turn = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    base = KroneckerDiagonal([None, turn[None]], torch.tensor([[q]]), orthogonal=True)
    with pytest.raises(CurvatureError, match="conjugate gradients stopped after 0 iterations"):
        Principal(base, torch.ones(2, dtype=torch.bool)).solve(torch.tensor([1.0, -1.0]))


def test_a_residual_within_the_slack_is_accepted():
    assert ConjugateGradients(draw(1), 5, 0.9e-4, False).accepted(1e-6).iterations == 5


@pytest.mark.parametrize("residual", [1.1e-4, float("nan")])
def test_a_residual_beyond_the_slack_is_an_error(residual):
    with pytest.raises(CurvatureError, match="1e-06 was asked for"):
        ConjugateGradients(draw(1), 5, residual, False).accepted(1e-6)


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_the_marginal_is_the_partial_trace_of_the_precision(mode, orthogonal):
    factors = [draw(2, 3, 3), None, draw(2, 4, 4, seed=1)]
    if orthogonal:
        factors = [None if U is None else torch.linalg.qr(U).Q for U in factors]
    operator = KroneckerDiagonal(factors, draw(2, 3, 2, 4, seed=2).abs() + 0.1, orthogonal=orthogonal)
    H = torch.linalg.inv(operator.dense()).view(2, 3, 2, 4, 2, 3, 2, 4)
    for group in range(2):
        expected = torch.einsum(["abcdbc->ad", "abcadc->bd", "abcabd->cd"][mode], H[group, ..., group, :, :, :])
        assert_close(operator.marginal(mode)[group], expected)


@pytest.mark.parametrize("most_rows", [0, 8])
@pytest.mark.parametrize("outer", [False, True])
def test_blocks_of_matrices_by_rows_and_by_pairs(outer, most_rows, monkeypatch):
    monkeypatch.setattr("sparsekit.linalg.kronecker.MOST_ROWS", most_rows)
    scale = draw(2, 4, 5, seed=3).abs() + 0.5 if outer else None
    q = draw(2, 4, 5, seed=2).abs() + 0.1
    operator = KroneckerDiagonal([draw(2, 4, 4), draw(2, 5, 5, seed=1)], q, outer=scale, orthogonal=False)
    index = torch.randperm(40, generator=torch.Generator().manual_seed(0)).view(5, 8)
    consecutive = torch.arange(40).view(5, 8)
    short = torch.tensor([[3, 19, 20, 39, 0, 4, -1, -1]])
    for asked in (index, consecutive, short):
        truth = operator.dense()[asked[:, :, None], asked[:, None, :]]
        surplus = asked < 0
        truth = torch.where(surplus[:, :, None] | surplus[:, None, :], torch.eye(8, dtype=truth.dtype), truth)
        assert_close(operator.blocks(asked), truth)
