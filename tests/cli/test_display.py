"""What a run's summary hints at."""

from types import SimpleNamespace

import pytest

from sparsekit.cli.display import beyond_the_model


def record(*levels, dense=0.4, substeps=1):
    levels = [SimpleNamespace(sparsity=s, predicted_increase=p, measured_increase=m) for s, p, m in levels]
    return SimpleNamespace(levels=levels, dense={"loss": dense}, settings={"substeps": substeps})


def test_a_cut_beyond_the_model_is_told_with_what_to_do():
    found = beyond_the_model(record((0.8, 0.1, 0.3), (0.95, 0.28, 3.64)))
    assert "at 95 % the cuts raised the loss by 3.64, 13 times what the quadratic model predicts" in found
    assert "--substeps 4" in found


def test_substeps_that_did_not_suffice_are_multiplied():
    assert "--substeps 16" in beyond_the_model(record((0.9, 0.1, 2.0), substeps=4))


@pytest.mark.parametrize(
    "level",
    [
        (0.9, 0.1, 0.4),  # within reach
        (0.9, 0.001, 0.02),  # many times, but hardly anything
        (0.9, float("nan"), 3.0),  # nothing is predicted
        (0.9, 0.0, 3.0),
        (0.9, 0.1, float("inf")),
    ],
)
def test_nothing_is_told_otherwise(level):
    assert beyond_the_model(record(level)) is None
