"""The built-in estimators, and the base of those on blocks: `obs`, `woodfisher` and `mfac` are it by name, so what it
does is checked here in full, and in each plugin only that it is built on it."""

import pytest
import torch

from sparsekit.methods.estimators import BlockFisher, DiagonalFisher, Identity
from sparsekit.testing import block_mask, damped, dense_fisher, estimator_checks
from sparsekit.testing.problems import EXAMPLES


class Blocks(BlockFisher):
    name = "blocks"


def blocks(objective, settings):
    sizes = objective.space.stretches(settings.block_size, across_tensors=settings.across_layers)
    return damped(dense_fisher(objective, settings.fisher) * block_mask(sizes), settings)


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
        DiagonalFisher, {"fisher": "empirical", "decay": 0.5}, ("mlp", "tied"), diagonal, **EXACT
    ),
}
#: Blocks kept as they are, and as rows; within a tensor and across; one damping and one relative to the Fisher's.
ON_BLOCKS = {
    "blocks of seven": {"block_size": 7, "damping": 1e-2, "damping_scale": "absolute"},
    "the whole": {"block_size": None, "across_layers": True, "fisher": "exact"},
    "whole tensors": {"block_size": 1000, "fisher": "exact", "decay": 0.5},
    "rows": {"store": "rows", "block_size": None, "across_layers": True},
    "rows in blocks": {"store": "rows", "block_size": 11, "damping": 1e-2, "damping_scale": "absolute"},
}
ESTIMATORS |= {
    label: estimator_checks(Blocks, settings, expected=blocks, solve_tolerance=1e-7)
    for label, settings in ON_BLOCKS.items()
}
ESTIMATORS["blocks of one"] = estimator_checks(Blocks, {"block_size": 1}, ("mlp", "tied"), blocks, solve_tolerance=1e-7)
ESTIMATORS["averaged"] = estimator_checks(
    Blocks,
    {"block_size": 9, "average": EXAMPLES, "examples": EXAMPLES},
    ("mlp", "convolution"),
    waived={"mean_over_examples": "a single example makes no mean of several, which it is given"},
    solve_tolerance=1e-7,
    correlation=0.6,  # a mean of few gradients, squared, is another matrix
)
CHECKS = [pytest.param(run, id=f"{label}-{name}") for label, checks in ESTIMATORS.items() for name, run in checks]


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check):
    check()
