"""Batches are prepared by another thread for an accelerator: the same ones, in the same order."""

import pytest
import torch

from sparsekit.errors import DataError
from sparsekit.problem.objective import ahead, pairs
from sparsekit.tasks.images import ImageBatches


def images(generator=None):
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (40, 3, 8, 8), generator=draw, dtype=torch.uint8)
    how = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "batch_size": 7, "generator": generator, "augment": bool(generator)}
    return ImageBatches(pixels, torch.arange(40), **how)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [None, 3])
def test_the_same_batches_arrive(accelerator, seed):
    made = (images(None if seed is None else torch.Generator().manual_seed(seed)) for _ in range(2))
    here, there = list(pairs(next(made), torch.device("cpu"))), list(pairs(next(made), accelerator))
    assert len(here) == len(there) == 6
    for (x, y), (X, Y) in zip(here, there, strict=True):
        assert X.device.type == accelerator.type
        assert torch.equal(X.cpu(), x) and torch.equal(Y.cpu(), y)


def test_what_goes_wrong_in_the_thread_is_told():
    def batches():
        yield torch.ones(2, 3), torch.ones(2)
        raise DataError("a damaged image")

    found = ahead(batches())
    assert next(found)[0].shape == (2, 3)
    with pytest.raises(DataError, match="a damaged image"):
        next(found)


def test_no_more_is_prepared_than_asked_for():
    taken = []
    found = ahead((taken.append(i) or (torch.ones(1), torch.ones(1)) for i in range(10)), depth=2)
    next(found)
    found.close()
    assert len(taken) <= 4
