import pytest

from sparsekit.testing import block_mask, damped, dense_fisher, estimator_checks
from sparsekit_mfac.estimator import MFAC


def blocks(objective, settings):
    sizes = objective.space.stretches(settings.block_size, across_tensors=settings.across_layers)
    return damped(dense_fisher(objective, settings.fisher) * block_mask(sizes), settings)


SETTINGS = {
    "rows": {"store": "rows"},
    "rows in blocks": {"store": "rows", "block_size": 11, "damping": 1e-2, "damping_scale": "absolute"},
    "rows within layers": {"store": "rows", "block_size": 11, "across_layers": False},
    "exact": {"block_size": 20, "fisher": "exact"},
}
CHECKS = [
    pytest.param(run, id=f"{label}-{name}")
    for label, settings in SETTINGS.items()
    for name, run in estimator_checks(MFAC, settings, expected=blocks, solve_tolerance=1e-7)
]


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check):
    check()
