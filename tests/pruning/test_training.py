"""Rates of a schedule, and of one that goes on."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

from sparsekit.pruning.training import half_cosine, stepwise

TOTAL = 63


def rates(done=0):
    optimiser = SGD([nn.Parameter(torch.zeros(1))], lr=7.0)  # of another step, as where a state has been read
    schedule = half_cosine(optimiser, 0.05, TOTAL, done=done)
    for _ in range(done, TOTAL):
        yield optimiser.param_groups[0]["lr"]
        optimiser.step()
        schedule.step()


def test_rates_fall_along_a_half_cosine():
    # bitwise: figures of earlier versions rest on them
    assert list(rates()) == [0.05 * 0.5 * (1 + math.cos(math.pi * step / TOTAL)) for step in range(TOTAL)]


@pytest.mark.parametrize("done", [1, 40, 62, 63])
def test_a_schedule_that_goes_on_has_the_rates_of_one_that_never_stopped(done):
    assert list(rates(done)) == list(rates())[done:]


def test_stepwise_rates_fall_to_a_tenth():
    optimiser = SGD([nn.Parameter(torch.zeros(1))], lr=7.0)
    schedule, seen = stepwise(optimiser, 0.1, 3), []
    for _ in range(7):
        seen.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert seen == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001])
