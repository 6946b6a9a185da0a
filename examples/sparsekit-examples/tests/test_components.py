"""The kits of all four kinds, and a fact of each component's own."""

import pytest
import torch

from sparsekit import Mask, ParameterSpace
from sparsekit.testing import pattern_checks, saliency_checks, schedule_checks, task_checks
from sparsekit_examples import Balanced, Lamp, Moons, Sine

CHECKS = {
    "lamp": saliency_checks(Lamp),
    "balanced": pattern_checks(Balanced),
    "sine": schedule_checks(Sine),
    "moons": task_checks(**Moons.conformance),
}


@pytest.mark.parametrize(
    "check", [pytest.param(run, id=f"{label}-{name}") for label, checks in CHECKS.items() for name, run in checks]
)
def test_conformance(check):
    check()


def test_balanced_takes_as_many_from_every_row():
    space = ParameterSpace({"w": (6, 10)})
    chosen = Balanced(Balanced.Settings()).choose(torch.rand(60), Mask.full(60), 24, space)
    assert chosen.view(6, 10).sum(1).tolist() == [4] * 6
