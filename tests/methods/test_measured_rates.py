import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sparsekit import Categorical, CompensationSettings, Gaussian, InverseFisher, Mask, Objective, ParameterSpace
from sparsekit.linalg import BlockDiagonal
from sparsekit.methods.measured_rates import MeasuredRates, MeasuredRatesSettings, hull
from sparsekit.methods.saliencies import Magnitude
from sparsekit.pruning.cut import Surgeon

SPACE = ParameterSpace({"a": (4, 10), "b": (4, 10), "c": (10,)})


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rates(**given):
    return MeasuredRates(MeasuredRatesSettings(**{"floor": 0, **given}))


def costs(name, count):
    """Convex increases of three layers, of which one bears much and one little."""
    return {"a": 0.01, "b": 0.1, "c": 1.0}[name] * (count / SPACE[name].size) ** 2


def trial(chosen, examples):
    lost = {info.name: int(chosen[info.slice].sum()) for info in SPACE.parameters}
    (name,) = (name for name, count in lost.items() if count)
    return costs(name, lost[name])


def lost(removed):
    return {info.name: int(removed[info.slice].sum()) for info in SPACE.parameters}


@pytest.mark.parametrize("count", [0, 1, 17, 45, 70, 90])
def test_removes_the_exact_number(count):
    pattern, scores, mask = rates(), draw(90), Mask.full(90)
    ranks = pattern.rescore(scores, mask, SPACE, trial)
    assert int(pattern.choose(ranks, mask, count, SPACE).sum()) == count


def test_ranks_within_a_tensor_keep_the_order_of_the_scores():
    scores = draw(90)
    ranks = rates().rescore(scores, Mask.full(90), SPACE, trial)
    for info in SPACE.parameters:
        assert torch.equal(ranks[info.slice].argsort(), scores[info.slice].argsort())


def test_a_tensor_that_bears_more_loses_more():
    scores, mask = draw(90), Mask.full(90)
    pattern = rates()
    removed = lost(pattern.choose(pattern.rescore(scores, mask, SPACE, trial), mask, 45, SPACE))
    assert removed["a"] > removed["b"] > removed["c"]


def test_the_sum_of_errors_is_the_least_of_all_combinations_of_the_grid():
    scores, mask, pattern = draw(90), Mask.full(90), rates()
    grid = {info.name: [0, *pattern._counts(info.size, info.size)] for info in SPACE.parameters}
    ranks = pattern.rescore(scores, mask, SPACE, trial)
    best = {}  # oracle: all combinations
    for counts in itertools.product(*grid.values()):
        total = sum(costs(name, count) for name, count in zip(grid, counts, strict=True))
        best[sum(counts)] = min(total, best.get(sum(counts), total))
    found = 0
    for count, least in best.items():
        removed = lost(pattern.choose(ranks, mask, count, SPACE))
        if all(removed[name] in grid[name] for name in grid):
            found += 1
            assert sum(costs(name, n) for name, n in removed.items()) == pytest.approx(least)
    assert found > 10


def test_the_hull_leaves_out_what_lies_above_it():
    assert hull([10, 20, 30], [5.0, 5.0, 30.0]) == [(20, 0.25), (30, 2.5)]


def test_noise_below_zero_counts_as_zero():
    assert hull([10, 20], [-1.0, 1.0]) == [(10, 0.0), (20, 0.1)]


def test_weights_below_the_last_trial_go_last():
    scores, mask, pattern = draw(90), Mask.full(90), rates(least_density=0.5)
    ranks = pattern.rescore(scores, mask, SPACE, trial)
    last = torch.cat(
        [ranks[info.slice].sort().values[pattern._counts(info.size, info.size)[-1] :] for info in SPACE.parameters]
    )
    assert int(last.min()) == 90 - len(last)


def test_a_tensor_that_is_gone_is_not_tried():
    mask = Mask(torch.arange(90) >= 40)
    seen = []
    rates().rescore(draw(90), mask, SPACE, lambda chosen, examples: seen.append(chosen) or 0.0)
    assert not any(bool(chosen[:40].any()) for chosen in seen)
    assert seen


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).double()


class Spy(MeasuredRates):
    """Tries one cut of nine weights, on all examples and on one batch."""

    def rescore(self, scores, mask, space, trial):
        chosen = torch.arange(space.size) < 9
        self.seen = [trial(chosen, 60), trial(chosen, 20)]
        return scores


def tried(likelihood, targets):
    """What the spy has seen, and for both the model's outputs before and after."""
    model, inputs = network(), draw(60, 6, seed=1)
    batches = list(zip(inputs.split(20), targets(inputs).split(20), strict=True))
    space = ParameterSpace.of(model)
    objective, weights, spy = (
        Objective(model, likelihood, batches, space),
        space.read(model),
        Spy(MeasuredRatesSettings()),
    )
    inverse = InverseFisher(BlockDiagonal((torch.eye(72) + 0.3).double()[None], [72]), 0.1)
    surgeon = Surgeon(Magnitude(None), spy, CompensationSettings())
    surgeon.remove(weights, Mask.full(72), 0.5, inverse, objective, torch.Generator())
    assert torch.equal(space.read(model), weights)  # nothing of the trials stays
    moved = weights + inverse.remove(weights, Mask.full(72), torch.arange(72) < 9).delta
    before = model(inputs).detach()
    space.write(model, moved)
    return spy.seen, before, model(inputs).detach(), targets(inputs)


def test_a_trial_measures_the_divergence_of_the_predictions():
    seen, before, after, _ = tried(Categorical(), lambda inputs: inputs[:, :3].argmax(1))
    p, q = before.log_softmax(1), after.log_softmax(1)
    divergence = (p.exp() * (p - q)).sum(1)
    assert_close(seen, [float(divergence.mean()), float(divergence[:20].mean())])


def test_the_divergence_of_gaussian_predictions_is_their_distance():
    seen, before, after, _ = tried(Gaussian(), lambda inputs: inputs[:, :3])
    likelihood = Gaussian()
    losses = likelihood.losses(after, before)
    assert_close(seen, [float(losses.mean()), float(losses[:20].mean())])


def test_with_class_weights_a_trial_measures_the_loss():
    weighted = Categorical(weight=(1.0, 2.0, 3.0))
    seen, before, after, targets = tried(weighted, lambda inputs: inputs[:, :3].argmax(1))
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    rise = nn.functional.cross_entropy(after, targets, w) - nn.functional.cross_entropy(before, targets, w)
    assert_close(seen[0], float(rise))
