import pytest
import torch

from sparsekit.testing import PROBLEMS, dense_fisher, problem


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_are_tiny_and_singular(name):
    objective = problem(name)
    assert objective.space.size <= 300 and objective.dtype == torch.float64 and not objective.model.training
    assert [len(targets) for _, targets in objective.batches] == [4, 4, 3]
    assert torch.linalg.matrix_rank(dense_fisher(objective, "empirical")) < objective.space.size


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_gradient_is_small_against_those_of_single_examples(name):
    objective = problem(name)
    scatter = dense_fisher(objective, "empirical").trace()
    assert objective.gradient().square().sum() < 0.3 * scatter


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_same_seed_gives_the_same_problem_whatever_the_global_one(name):
    found = []
    for ambient in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ambient)
            before = torch.get_rng_state()
            objective = problem(name, seed=3)
            assert torch.equal(torch.get_rng_state(), before)
        found.append([*objective.model.state_dict().values(), *(x for batch in objective.batches for x in batch)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_another_seed_gives_another_problem():
    weights = [objective.space.read(objective.model) for objective in (problem("mlp"), problem("mlp", seed=1))]
    assert not torch.equal(*weights)


def test_a_tied_tensor_counts_once():
    assert problem("tied").space.names == ("first.weight", "head.weight")
