import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sparsekit.methods.interfaces import EstimatorSettings
from sparsekit.problem.likelihoods import Bernoulli, Categorical, Gaussian, as_likelihood
from sparsekit.problem.objective import Objective
from sparsekit.problem.parameters import ParameterSpace
from sparsekit.testing import (
    block_mask,
    damped,
    dense_fisher,
    dense_inverse,
    dense_removal,
    dense_rows,
    exhaustive_removal,
    greedy_removal,
    rank_one_inverse,
)
from sparsekit.testing import problem as of_the_kit


def t(values):
    return torch.tensor(values, dtype=torch.float64)


def one_weight_an_output(likelihood, outputs, x, y, weight=0.0):
    """f_k = w_k x, for inputs x (N,)."""
    model = nn.Linear(1, outputs, bias=False).double()
    nn.init.constant_(model.weight, weight)
    return Objective(model, likelihood, [(t(x)[:, None], torch.as_tensor(y))], ParameterSpace.of(model))


H = t([[2.0, 1.0], [1.0, 2.0]])
WEIGHTS = t([1.0, 3.0])
NONE, FIRST, BOTH = (torch.tensor(flags) for flags in ([False, False], [True, False], [True, True]))


# H_22 δ_2 = −H_21 (−1) − g_2; ½ δᵀHδ = δ_1² + δ_1 δ_2 + δ_2²
@pytest.mark.parametrize(
    ("chosen", "how", "gradient", "delta", "increase"),
    [
        (FIRST, "joint", None, [-1.0, 0.5], 0.75),
        (FIRST, "independent", None, [-1.0, 0.5], 0.75),
        (FIRST, "none", None, [-1.0, 0.0], 1.0),
        (FIRST, "joint", [0.0, 1.0], [-1.0, 0.0], 1.0),
        (FIRST, "none", [2.0, 1.0], [-1.0, 0.0], -1.0),
        (BOTH, "joint", None, [-1.0, -3.0], 13.0),
        (BOTH, "independent", None, [-1.0, -3.0], 13.0),
    ],
)
def test_removal_of_two_weights_by_hand(chosen, how, gradient, delta, increase):
    found = dense_removal(H, WEIGHTS, chosen, NONE, how, None if gradient is None else t(gradient))
    assert_close(found[0], t(delta))
    assert found[1] == pytest.approx(increase)


def test_independent_removal_adds_what_joint_removal_shares():
    H = t([[1.0, 0.5, 0.0], [0.5, 1.0, 0.5], [0.0, 0.5, 1.0]])
    inverse = torch.linalg.inv(H)  # 2 × [[0.75, -0.5, 0.25], [-0.5, 1, -0.5], [0.25, -0.5, 0.75]]
    chosen, none = torch.tensor([True, False, True]), torch.zeros(3, dtype=torch.bool)
    assert_close(inverse[1], t([-1.0, 2.0, -1.0]))
    joint, independent = (
        dense_removal(H, torch.ones_like(H[0]), chosen, none, how) for how in ("joint", "independent")
    )
    assert_close(joint[0], t([-1.0, 1.0, -1.0]))
    assert_close(independent[0], t([-1.0, 4 / 3, -1.0]))
    assert joint[1] == pytest.approx(0.5)


def test_what_was_removed_before_stays_removed():
    H = t([[1.0, 0.5, 0.0], [0.5, 1.0, 0.5], [0.0, 0.5, 1.0]])
    chosen, removed = torch.tensor([True, False, False]), torch.tensor([False, True, False])
    for how in ("joint", "independent", "none"):
        delta, _ = dense_removal(H, t([1.0, 0.0, 1.0]), chosen, removed, how)
        assert delta[:2].tolist() == [-1.0, 0.0]


# Weights 0 and 1 cancel: cheap to remove together (0.1), each about as dear alone (0.095); weight 2 costs 0.08.
PAIR = t([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
PAIR_WEIGHTS = t([1.0, -1.0, 0.4])


def test_greedy_removal_takes_the_cheapest_next():
    order, increases = greedy_removal(PAIR, PAIR_WEIGHTS, 3)
    assert order.tolist() == [2, 0, 1]
    assert_close(increases, t([0.08, 0.175, 0.18]))


def test_exhaustive_removal_sees_what_greedy_misses():
    chosen, increase = exhaustive_removal(PAIR, PAIR_WEIGHTS, 2)
    assert chosen.tolist() == [True, True, False]
    assert increase == pytest.approx(0.1)


def test_exhaustive_removal_refuses_many_weights():
    with pytest.raises(ValueError, match="at most 12"):
        exhaustive_removal(torch.eye(13), torch.ones(13), 2)


def test_the_fisher_of_a_softmax_by_hand():
    objective = one_weight_an_output(Categorical(), 2, [2.0, 0.0], [0, 1])
    assert_close(dense_fisher(objective, "exact"), t([[0.5, -0.5], [-0.5, 0.5]]))  # ½ · 2² · (diag p − ppᵀ), p = ½
    assert_close(dense_rows(objective, "empirical"), t([[-1.0, 1.0], [0.0, 0.0]]))  # x (p − e_y)


def test_the_fisher_of_one_unit_by_hand():
    objective = one_weight_an_output(Bernoulli(), 1, [2.0], t([[1.0]]))
    assert_close(dense_fisher(objective, "exact"), t([[1.0]]))  # x² p (1 − p)
    assert_close(dense_rows(objective, "empirical"), t([[-1.0]]))  # x (p − y)


# x² / variance and x (f − y) / variance; under the mean over T = 2 outputs 1/T and √T · 1/T of them
@pytest.mark.parametrize(("reduction", "exact", "row"), [("sum", 1.0, 1.0), ("mean", 0.5, 0.5**0.5)])
def test_the_fisher_of_two_outputs_by_hand(reduction, exact, row):
    objective = one_weight_an_output(Gaussian(0.5, reduction), 2, [2.0], t([[1.0, 3.0]]))
    assert_close(dense_fisher(objective, "exact"), exact * t([[8.0, 0.0], [0.0, 8.0]]))
    assert_close(dense_rows(objective, "empirical"), row * t([[-4.0, -12.0]]))


def test_a_loss_without_a_distribution_has_no_reference():
    objective = one_weight_an_output(as_likelihood(nn.L1Loss()), 1, [2.0], t([[1.0]]))
    with pytest.raises(TypeError, match="no dense reference"):
        dense_fisher(objective, "exact")


def test_the_network_is_not_touched():
    objective = one_weight_an_output(Categorical(), 2, [2.0, 0.0], [0, 1])
    objective.model.train()
    dense_fisher(objective, "exact")
    assert objective.model.training and objective.model.weight.requires_grad and objective.model.weight.grad is None


def test_damping_by_hand():
    F = t([[1.0, 0.0], [0.0, 3.0]])
    assert_close(damped(F, EstimatorSettings(damping=0.5, damping_scale="relative")), t([[2.0, 0.0], [0.0, 4.0]]))
    assert_close(damped(F, EstimatorSettings(damping=0.5, damping_scale="absolute")), t([[1.5, 0.0], [0.0, 3.5]]))
    assert_close(dense_inverse(F, 1.0), t([[0.5, 0.0], [0.0, 0.25]]))


def test_the_rank_one_recursion_by_hand():
    rows = t([[1.0, 1.0], [1.0, -1.0]])
    assert_close(rank_one_inverse(rows, 1.0), 0.5 * torch.eye(2, dtype=torch.float64))  # GᵀG / 2 = I
    assert_close(rank_one_inverse(rows[:1], 1.0), t([[2.0, -1.0], [-1.0, 2.0]]) / 3)


def test_block_masks():
    assert block_mask([1, 2]).tolist() == [[True, False, False], [False, True, True], [False, True, True]]


def test_a_fisher_of_no_such_kind_is_refused():
    with pytest.raises(ValueError, match="no dense Fisher of the kind 'nonsense'; 'exact' or 'empirical'"):
        dense_fisher(of_the_kit("mlp"), "nonsense")
