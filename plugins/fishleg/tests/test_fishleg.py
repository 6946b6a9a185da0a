import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sparsekit import Categorical, CurvatureError, DataError, Gaussian, Mask, Objective, ParameterSpace
from sparsekit.curvature import gradient_rows
from sparsekit_fishleg.estimator import FishLeg, FishLegSettings

DAMPING = 0.05


def problem(include=None, count=96, conv=False, batch=8):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if conv:
            model = nn.Sequential(
                nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
            )
            inputs = torch.randn(count, 1, 4, 4)
        else:
            model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
            inputs = torch.randn(count, 5)
        targets = torch.randint(3, (count,))
    model = model.double()
    batches = list(zip(inputs.double().split(batch), targets.split(batch), strict=True))
    return Objective(model, Categorical(), batches, ParameterSpace.of(model, include=include))


def estimator(objective, updates=1, **settings):
    chosen = {"damping": DAMPING, "damping_scale": "absolute", "fisher": "exact", "held_out": 0.2, "auxiliary_steps": 0}
    made = FishLeg(objective.space, FishLegSettings(**(chosen | settings)))
    generator = torch.Generator().manual_seed(0)
    figures = [made.update(objective, generator=generator) for _ in range(updates)]
    return made, figures


def layer_block_inverse(objective):
    """Oracle: the exact Fisher by rows, cut to one block a tensor, damped and inverted in float64."""
    F = sum(rows.mT @ rows for rows in gradient_rows(objective, "exact")) / objective.count()
    out = torch.zeros_like(F)
    for info in objective.space.parameters:
        block = F[info.slice, info.slice]
        out[info.slice, info.slice] = torch.linalg.inv(block + DAMPING * torch.eye(info.size, dtype=F.dtype))
    return out


def error(estimator, objective):
    truth = layer_block_inverse(objective)
    return float((estimator.inverse().operator.dense() - truth).norm() / truth.norm())


def test_the_identity_start_is_magnitude_pruning():
    objective = problem()
    made, _ = estimator(objective, start="identity")
    assert_close(made.inverse().diagonal(), torch.full((48,), 1 / DAMPING, dtype=torch.float64))


@pytest.mark.parametrize("conv", [False, True])
def test_the_eigenbasis_start_is_near_the_exact_inverse(conv):
    objective = problem(conv=conv)
    assert error(estimator(objective)[0], objective) < 0.2


def test_the_eigenbasis_is_nearer_than_the_identity():
    objective = problem()
    assert error(estimator(objective)[0], objective) < 0.5 * error(estimator(objective, start="identity")[0], objective)


def test_a_vector_parameter_has_a_diagonal_block():
    objective = problem(include=["*.bias"])
    made, _ = estimator(objective)
    F = sum(rows.square().sum(0) for rows in gradient_rows(objective, "exact")) / objective.count()
    assert_close(made.inverse().diagonal(), 1 / (F + DAMPING))


@pytest.mark.parametrize("structure", ["eigenbasis", "kronecker"])
@pytest.mark.parametrize("preconditioned", [True, False], ids=["preconditioned", "plain"])
def test_auxiliary_steps_from_the_identity_approach_the_exact_inverse(structure, preconditioned):
    objective = problem(batch=24)
    before, _ = estimator(objective, start="identity", structure=structure)
    after, figures = estimator(
        objective,
        start="identity",
        structure=structure,
        auxiliary_steps=300,
        auxiliary_learning_rate=1e-2,
        check_every=100,
        preconditioned=preconditioned,
    )
    assert error(after, objective) < 0.6 * error(before, objective)
    assert figures[0]["residual_after"] < figures[0]["residual_before"]


def test_exact_network_products_also_fit():
    objective = problem(batch=24)
    before, _ = estimator(objective, start="identity")
    after, _ = estimator(
        objective,
        start="identity",
        products="network",
        auxiliary_steps=100,
        auxiliary_learning_rate=1e-2,
        check_every=25,
    )
    assert error(after, objective) < error(before, objective)


def test_the_fit_never_ends_worse_than_it_began_on_held_out_examples():
    objective = problem()
    _, figures = estimator(objective, auxiliary_steps=40, auxiliary_learning_rate=0.05)
    assert figures[0]["residual_after"] <= figures[0]["residual_before"]


def test_a_fit_that_diverges_says_what_to_change():
    objective = problem()
    with pytest.raises(CurvatureError, match="lower estimator.auxiliary_learning_rate or raise estimator.damping"):
        estimator(objective, auxiliary_steps=50, auxiliary_learning_rate=1e4, check_every=1)


def test_the_operator_is_symmetric_with_the_diagonal_it_claims():
    objective = problem(conv=True)
    made, _ = estimator(objective, auxiliary_steps=10, auxiliary_learning_rate=1e-2)
    dense = made.inverse().operator.dense()
    assert_close(dense, dense.mT)
    assert_close(made.inverse().diagonal(), dense.diagonal())


def test_another_damping_is_the_closed_form_at_that_damping():
    objective = problem()
    made, _ = estimator(objective)
    other, _ = estimator(objective, damping=0.5)
    assert_close(made.inverse(0.5).operator.dense(), other.inverse().operator.dense())


def test_the_same_examples_again_change_nothing_but_by_the_projection():
    objective = problem()
    once, _ = estimator(objective)
    twice, _ = estimator(objective, updates=2, decay=0.5)
    assert_close(once.inverse().operator.dense(), twice.inverse().operator.dense(), atol=1e-5, rtol=1e-5)


def test_the_inverse_of_the_survivors_is_learned_when_asked_for():
    objective = problem()
    made, _ = estimator(objective, after_cut="learn")
    kept = torch.arange(48) % 2 == 0
    made.shrink(Mask(kept))
    made.update(objective, generator=torch.Generator().manual_seed(1))
    dense = made.inverse().operator.dense()
    assert (dense[kept][:, ~kept] == 0).all()


def test_the_state_survives_a_round_trip():
    objective = problem()
    first, _ = estimator(objective, auxiliary_steps=5)
    second = FishLeg(objective.space, first.settings)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.inverse().operator.dense(), second.inverse().operator.dense())


def test_one_batch_cannot_be_both_learned_from_and_held_out():
    objective = problem(count=8)
    with pytest.raises(DataError, match="set estimator.auxiliary_steps=0"):
        estimator(objective, auxiliary_steps=5)


def test_a_gaussian_likelihood():
    base = problem()
    batches = [(x, torch.zeros(len(y), 3, dtype=torch.float64)) for x, y in base.batches]
    objective = Objective(base.model, Gaussian(), batches, base.space)
    assert error(estimator(objective)[0], objective) < 0.2


def test_memory_covers_the_state():
    objective = problem(conv=True)
    made, _ = estimator(objective, auxiliary_steps=5)
    held = sum(t.numel() * t.element_size() for t in made.state_dict().values())
    assert held <= FishLeg.memory(objective.space, made.settings)
