"""With its own defaults; what it is built on is checked in full in the core."""

import pytest

from sparsekit.testing import block_mask, damped, dense_fisher, estimator_checks
from sparsekit_mfac.estimator import MFAC


def blocks(objective, settings):
    sizes = objective.space.stretches(settings.block_size, across_tensors=settings.across_layers)
    return damped(dense_fisher(objective, settings.fisher) * block_mask(sizes), settings)


CHECKS = estimator_checks(MFAC, problems=("convolution", "tied"), expected=blocks, solve_tolerance=1e-7)


@pytest.mark.parametrize("check", [pytest.param(run, id=name) for name, run in CHECKS])
def test_conformance(check):
    check()
