import pytest
import torch
from torch.testing import assert_close

from sparsekit import Mask, ParameterSpace
from sparsekit.testing import dense_rows, problem, rank_one_inverse
from sparsekit_obs.estimator import BlockFisher, BlockFisherSettings, block_sizes


@pytest.fixture
def objective():
    return problem("tied")


def estimator(objective, **settings):
    made = BlockFisher(objective.space, BlockFisherSettings(damping=1e-3, damping_scale="absolute", **settings))
    made.update(objective, generator=torch.Generator().manual_seed(0))
    return made


def test_the_rank_one_recursion_gives_the_same_matrix(objective):
    sigma = rank_one_inverse(dense_rows(objective, "empirical")[:, :20], 1e-3)
    assert_close(estimator(objective, block_size=20).inverse().operator.dense()[:20, :20], sigma)


def test_no_block_crosses_a_tensor():
    assert block_sizes(ParameterSpace({"a": (5,), "b": (4,)}), 3) == [3, 2, 3, 1]


def test_the_diagonal_is_conditioned_on_removed_weights(objective):
    inverse = estimator(objective, block_size=20).inverse()
    kept = torch.arange(40) % 3 != 0
    H = torch.linalg.inv(inverse.operator.dense())
    truth = torch.zeros(40, dtype=torch.float64)
    truth[kept] = torch.linalg.inv(H[kept][:, kept]).diagonal()
    assert_close(inverse.diagonal(Mask(kept)), truth)


def test_decay_mixes_estimates(objective):
    once = estimator(objective, decay=0.5)
    before = once.state_dict()["blocks"].clone()
    once.update(objective, generator=torch.Generator())
    assert_close(once.state_dict()["blocks"], before)  # the same examples at the same weights
