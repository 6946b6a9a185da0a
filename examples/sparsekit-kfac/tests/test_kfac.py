"""The kit, and one fact of K-FAC's own: for one example and one position B ⊗ A is the Fisher's block."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sparsekit import Categorical, Objective, ParameterSpace
from sparsekit.testing import dense_fisher, estimator_checks
from sparsekit_kfac import Kfac, KfacSettings

CHECKS = estimator_checks(Kfac, **Kfac.conformance)


@pytest.mark.parametrize("check", [pytest.param(run, id=name) for name, run in CHECKS])
def test_conformance(check):
    check()


def test_of_one_example_it_is_exact():
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    batches = [(torch.randn(1, 4, dtype=torch.float64), torch.tensor([1]))]
    objective = Objective(model, Categorical(), batches, ParameterSpace.of(model))
    made = Kfac(objective.space, KfacSettings(fisher="empirical", damping=0.1, damping_scale="absolute"))
    made.update(objective, generator=torch.Generator().manual_seed(0))
    H = dense_fisher(objective, "empirical") + 0.1 * torch.eye(12, dtype=torch.float64)
    assert_close(made.inverse().operator @ torch.eye(12, dtype=torch.float64), torch.linalg.inv(H))


def test_a_refresh_keeps_its_share():
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False)
    batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    objective = Objective(model, Categorical(), batches, ParameterSpace.of(model))
    made = Kfac(objective.space, KfacSettings(fisher="empirical", decay=0.75))
    made.update(objective, generator=torch.Generator().manual_seed(0))
    first = made.state_dict()["weight.inputs"]
    batches[0] = (2 * batches[0][0], batches[0][1])
    made.update(objective, generator=torch.Generator().manual_seed(0))
    assert_close(made.state_dict()["weight.inputs"], 0.75 * first + 0.25 * 4 * first)
