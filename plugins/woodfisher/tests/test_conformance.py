import pytest

from sparsekit.testing import block_mask, damped, dense_fisher, estimator_checks
from sparsekit_woodfisher.estimator import WoodFisher


def blocks(objective, settings):
    sizes = objective.space.stretches(settings.block_size, across_tensors=settings.across_layers)
    return damped(dense_fisher(objective, settings.fisher) * block_mask(sizes), settings)


SETTINGS = {
    "chunks": {"store": "blocks"},
    "chunks by rows": {"store": "rows", "block_size": 13},
}
CHECKS = [
    pytest.param(run, id=f"{label}-{name}")
    for label, settings in SETTINGS.items()
    for name, run in estimator_checks(WoodFisher, settings, expected=blocks, solve_tolerance=1e-7)
]


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check):
    check()
