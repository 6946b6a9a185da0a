import pytest

from sparsekit.testing import block_mask, damped, dense_fisher, estimator_checks
from sparsekit_obs.estimator import OptimalBrainSurgeon


def blocks(objective, settings):
    sizes = objective.space.stretches(settings.block_size, across_tensors=settings.across_layers)
    return damped(dense_fisher(objective, settings.fisher) * block_mask(sizes), settings)


SETTINGS = {
    "one": {"block_size": 1},
    "seven": {"block_size": 7, "damping": 1e-2, "damping_scale": "absolute"},
    "dense": {"block_size": None, "across_layers": True, "fisher": "exact"},
    "whole tensors": {"block_size": 1000, "fisher": "exact", "decay": 0.5},
}
CHECKS = [
    pytest.param(run, id=f"{label}-{name}")
    for label, settings in SETTINGS.items()
    for name, run in estimator_checks(OptimalBrainSurgeon, settings, expected=blocks, solve_tolerance=1e-7)
]


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check):
    check()
