import pytest
import torch

from sparsekit.estimators import DiagonalFisher, Identity
from sparsekit.testing import damped, dense_fisher, estimator_checks


def identity(objective, settings):
    return damped(torch.eye(objective.space.size, dtype=torch.float64), settings)


def diagonal(objective, settings):
    return damped(torch.diag(dense_fisher(objective, settings.fisher).diagonal()), settings)


EXACT = {"tolerance": 1e-9, "solve_tolerance": 1e-9}
ESTIMATORS = {
    "identity": estimator_checks(Identity, problems=("mlp", "convolution"), expected=identity, **EXACT),
    "diagonal": estimator_checks(DiagonalFisher, problems=("convolution", "tied", "bernoulli"), **EXACT),
    "diagonal, exact": estimator_checks(
        DiagonalFisher, {"fisher": "exact", "damping_scale": "absolute"}, expected=diagonal, **EXACT
    ),
    "diagonal, empirical": estimator_checks(
        DiagonalFisher, {"fisher": "empirical", "decay": 0.5}, expected=diagonal, **EXACT
    ),
}
CHECKS = [pytest.param(run, id=f"{label}-{name}") for label, checks in ESTIMATORS.items() for name, run in checks]


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check):
    check()
