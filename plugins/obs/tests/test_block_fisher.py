import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sparsekit import Categorical, Mask, Objective, ParameterSpace
from sparsekit.curvature import gradient_rows
from sparsekit_obs.estimator import BlockFisher, BlockFisherSettings, block_sizes


@pytest.fixture
def objective():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        inputs, targets = torch.randn(9, 4, dtype=torch.float64), torch.randint(3, (9,))
    return Objective(model, Categorical(), [(inputs, targets)], ParameterSpace.of(model))


def estimator(objective, **settings):
    made = BlockFisher(objective.space, BlockFisherSettings(damping=1e-3, damping_scale="absolute", **settings))
    made.update(objective, generator=torch.Generator().manual_seed(0))
    return made


def dense_blocks(objective, size, damping):
    """Oracle: the empirical Fisher by rows, cut to the blocks, in float64."""
    rows = torch.cat(list(gradient_rows(objective, "empirical")))
    F = rows.mT @ rows / len(rows)
    where = torch.zeros_like(F)
    start = 0
    for length in block_sizes(objective.space, size):
        where[start : start + length, start : start + length] = 1
        start += length
    return F * where + damping * torch.eye(len(F), dtype=F.dtype)


@pytest.mark.parametrize("size", [1, 3, 7, 20, 1000])
def test_sigma_is_the_inverse_of_the_damped_blocks(objective, size):
    inverse = estimator(objective, block_size=size).inverse()
    assert_close(inverse.operator.dense(), torch.linalg.inv(dense_blocks(objective, size, 1e-3)))


def test_the_rank_one_recursion_gives_the_same_matrix(objective):
    rows = torch.cat(list(gradient_rows(objective, "empirical")))[:, :20]
    sigma, m = torch.eye(20, dtype=torch.float64) / 1e-3, len(rows)
    for g in rows:
        Sg = sigma @ g
        sigma = sigma - torch.outer(Sg, Sg) / (m + g @ Sg)
    assert_close(estimator(objective, block_size=20).inverse().operator.dense()[:20, :20], sigma)


def test_another_damping_reuses_the_statistics(objective):
    truth = torch.linalg.inv(dense_blocks(objective, 7, 0.5))
    assert_close(estimator(objective, block_size=7).inverse(0.5).operator.dense(), truth)


def test_no_block_crosses_a_tensor():
    assert block_sizes(ParameterSpace({"a": (5,), "b": (4,)}), 3) == [3, 2, 3, 1]


def test_the_state_survives_a_round_trip(objective):
    first = estimator(objective)
    second = BlockFisher(objective.space, first.settings)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.inverse().diagonal(), second.inverse().diagonal())


def test_the_diagonal_is_conditioned_on_removed_weights(objective):
    inverse = estimator(objective, block_size=20).inverse()
    kept = torch.arange(35) % 3 != 0
    H = dense_blocks(objective, 20, 1e-3)
    truth = torch.zeros(35, dtype=torch.float64)
    truth[kept] = torch.linalg.inv(H[kept][:, kept]).diagonal()
    assert_close(inverse.diagonal(Mask(kept)), truth)


def test_decay_mixes_estimates(objective):
    once = estimator(objective, decay=0.5)
    before = once.state_dict()["blocks"].clone()
    once.update(objective, generator=torch.Generator())
    assert_close(once.state_dict()["blocks"], before)  # the same examples at the same weights
