import pytest

from sparsekit.testing import block_mask, damped, dense_fisher, estimator_checks
from sparsekit_obs.estimator import BlockFisher, block_sizes


def blocks(objective, settings):
    inside = block_mask(block_sizes(objective.space, settings.block_size))
    return damped(dense_fisher(objective, settings.fisher) * inside, settings)


SETTINGS = {
    "one": {"block_size": 1},
    "seven": {"block_size": 7, "damping": 1e-2, "damping_scale": "absolute"},
    "whole tensors": {"block_size": 1000, "fisher": "exact", "decay": 0.5},
}
CHECKS = [
    pytest.param(run, id=f"{label}-{name}")
    for label, settings in SETTINGS.items()
    for name, run in estimator_checks(BlockFisher, settings, expected=blocks, solve_tolerance=1e-7)
]


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check):
    check()
