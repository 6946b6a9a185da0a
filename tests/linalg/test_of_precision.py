"""What is made `of_precision` has the precision it was made from, densely, in float64."""

import torch
from torch.testing import assert_close

from sparsekit.linalg import BlockDiagonal, DiagonalPlusLowRank, RepeatedBlock

H = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)


def test_blocks_of_precision():
    sigma = BlockDiagonal.of_precision(torch.stack([H, 2 * H]), [2, 2]).dense()
    assert_close(sigma, torch.linalg.inv(torch.block_diag(H, 2 * H)))


def test_repeated_blocks_of_precision():
    sigma = RepeatedBlock.of_precision(H[None], 3, slice_bytes=1).dense()
    assert_close(sigma, torch.linalg.inv(torch.block_diag(H, H, H)))


def test_low_rank_of_precision():
    sigma = DiagonalPlusLowRank.of_precision(H, 0.5, 4).dense()
    assert_close(sigma, torch.linalg.inv(0.5 * torch.eye(2, dtype=torch.float64) + H.mT @ H / 4))


def test_a_subclass_is_made_of_precision_too():
    class Own(BlockDiagonal):
        pass

    assert type(Own.of_precision(H[None], [2])) is Own
