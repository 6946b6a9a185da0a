"""An accelerator's host waits at most once a batch, and once in several iterations of a solve."""

import sys
from pathlib import Path

import pretend
import pytest
import torch

from sparsekit.linalg import conjugate_gradients
from sparsekit.linalg.iterative import CHECK_EVERY

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
pytestmark = pytest.mark.gpu


@pytest.fixture
def pretended(accelerator):
    if accelerator.type == "cuda":
        pytest.skip("waits are counted on the pretended device")
    return accelerator


def phases():
    import waits

    return list(waits.PHASES)


@pytest.mark.parametrize("phase", phases())
def test_a_batch_makes_the_host_wait_once_at_most(phase, pretended):
    import waits

    few, many = (waits.waits(phase, batches, pretended).total() for batches in (8, 16))
    assert many - few <= 8


def test_a_solve_waits_once_in_several_iterations(pretended):
    A = torch.diag(torch.linspace(1, 1000, 200, dtype=torch.float64)).to(pretended)
    b = torch.ones(200, dtype=torch.float64, device=pretended)
    with pretend.Watch() as watch:
        found = conjugate_gradients(lambda v: A @ v, b, preconditioner=lambda v: v, tolerance=1e-8)
    assert found.iterations > 40
    assert watch.waits().total() <= found.iterations / CHECK_EVERY + 3


def test_a_solve_gives_what_it_gives_on_the_cpu(accelerator):
    def solved(device):
        diagonal = torch.linspace(1, 1000, 200, dtype=torch.float64).to(device)
        b = torch.ones_like(diagonal)
        return conjugate_gradients(lambda v: diagonal * v, b, preconditioner=lambda v: v, tolerance=1e-8)

    here, there = solved("cpu"), solved(accelerator)
    assert here.iterations == there.iterations and here.converged and there.converged
    torch.testing.assert_close(there.solution.cpu(), here.solution)
