"""The base of obs, woodfisher and mfac: blocks of the damped Fisher, kept as blocks or as rows, inverted exactly."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sparsekit import (
    BlockFisher,
    BlockFisherSettings,
    Categorical,
    CurvatureError,
    DataError,
    Mask,
    Memory,
    Objective,
    ParameterSpace,
    SettingsError,
)
from sparsekit.curvature import averaged_rows, gradient_rows
from sparsekit.linalg import DiagonalPlusLowRank

N, P = 12, 35


class Fisher(BlockFisher):
    name = "blocks"


@pytest.fixture(scope="module")
def objective():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        inputs, targets = torch.randn(N, 4, dtype=torch.float64), torch.randint(3, (N,))
    batches = list(zip(inputs.split(5), targets.split(5), strict=True))
    return Objective(model, Categorical(), batches, ParameterSpace.of(model))


def options(**given):
    return BlockFisherSettings(**{"damping": 1e-3, "damping_scale": "absolute", "examples": N, **given})


def estimator(objective, **given):
    made = Fisher(objective.space, options(**given))
    made.update(objective, generator=torch.Generator().manual_seed(0))
    return made


def all_rows(objective):
    return torch.cat(list(gradient_rows(objective, "empirical")))


def truth(rows, sizes, damping):
    """Oracle: the second moment of the rows, cut to the blocks, damped, in float64."""
    block = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    F = rows.mT @ rows / len(rows)
    return F * (block[:, None] == block) + damping * torch.eye(len(F), dtype=F.dtype)


def recursion(rows, damping):
    """The published rank-one recursion, from I/γ."""
    sigma, m = torch.eye(rows.shape[1], dtype=rows.dtype) / damping, len(rows)
    for g in rows:
        Sg = sigma @ g
        sigma = sigma - torch.outer(Sg, Sg) / (m + g @ Sg)
    return sigma


PARTITIONS = [(1, False), (3, False), (7, False), (20, False), (None, False), (6, True), (13, True), (None, True)]


@pytest.mark.parametrize("store", ["rows", "blocks"])
@pytest.mark.parametrize(("block_size", "across"), PARTITIONS, ids=str)
def test_sigma_is_the_inverse_of_the_damped_blocks(objective, block_size, across, store):
    inverse = estimator(objective, block_size=block_size, across_layers=across, store=store).inverse()
    sizes = objective.space.stretches(block_size, across_tensors=across)
    H = truth(all_rows(objective), sizes, 1e-3)
    assert_close(inverse.operator.dense(), torch.linalg.inv(H))
    assert_close(inverse.precision(torch.eye(P, dtype=torch.float64)), H)


@pytest.mark.parametrize("size", [7, 35], ids=["m > B", "m < B"])
@pytest.mark.parametrize("store", ["rows", "blocks"])
def test_the_rank_one_recursion_gives_the_same_matrix(objective, size, store):
    found = estimator(objective, block_size=size, across_layers=True, store=store).inverse().operator.dense()
    rows = all_rows(objective)
    for start in range(0, P, size):
        where = slice(start, start + size)
        assert_close(found[where, where], recursion(rows[:, where], 1e-3))


@pytest.mark.parametrize(("block_size", "rows"), [(12, False), (13, True), (20, True)], ids=str)
def test_rows_are_kept_where_they_are_fewer_than_a_block_is_long(objective, block_size, rows):
    made = estimator(objective, block_size=block_size)
    assert ("rows" in made.state_dict()) == rows


@pytest.mark.parametrize("store", ["rows", "blocks"])
def test_joint_removal_is_constrained_least_squares(objective, store):
    inverse = estimator(objective, block_size=None, across_layers=True, store=store).inverse()
    H = truth(all_rows(objective), [P], 1e-3)
    draw = torch.Generator().manual_seed(1)
    w = torch.randn(P, generator=draw, dtype=torch.float64)
    gone, chosen = torch.arange(P) % 5 == 0, torch.arange(P) % 3 == 1
    chosen &= ~gone
    w[gone] = 0
    S = ~(gone | chosen)
    delta = torch.where(chosen, -w, 0.0)
    delta[S] = -torch.linalg.solve(H[S][:, S], H[S][:, chosen] @ delta[chosen])
    removal = inverse.remove(w, Mask(~gone), chosen)
    assert_close(removal.delta, delta)
    assert removal.increase == pytest.approx(float(0.5 * delta @ H @ delta))


def test_averaged_rows_estimate_the_same_matrix(objective):
    rows = all_rows(objective)
    means = rows.view(4, 3, P).mean(1) * 3**0.5
    found = estimator(objective, average=3, block_size=None, across_layers=True)
    assert_close(found.inverse().operator.dense(), torch.linalg.inv(truth(means, [P], 1e-3)))


def test_the_batches_that_rows_come_in_do_not_matter(objective):
    rows = all_rows(objective)
    whole, split = list(averaged_rows([rows], 4)), list(averaged_rows(rows.split(5), 4))
    assert_close(torch.cat(whole), torch.cat(split))


@pytest.mark.parametrize("average", [2, 3, 6, 12])
def test_averaged_rows_come_together(objective, average):
    batches = list(averaged_rows(all_rows(objective).split(6), average))
    assert max(map(len, batches)) >= min(6, N // average)


@pytest.mark.parametrize("average", [2, 3, 4, 6])
def test_each_row_is_averaged_with_its_neighbours(objective, average):
    rows = all_rows(objective)
    found = torch.cat(list(averaged_rows(rows.split(5), average)))
    assert_close(found, rows.view(-1, average, P).sum(1) / average**0.5)


def test_examples_that_the_average_does_not_divide_are_refused(objective):
    made = Fisher(objective.space, options(average=5, examples=20))
    with pytest.raises(DataError, match="12 examples, which average=5 does not divide: give 10 or"):
        made.update(objective, generator=torch.Generator())


@pytest.mark.parametrize("store", ["rows", "blocks"])
def test_no_data_is_an_error(objective, store):
    with pytest.raises(DataError, match="no batch"):
        estimator(replace(objective, batches=[]), store=store)


@pytest.mark.parametrize("store", ["rows", "blocks"])
def test_what_came_is_recorded_rather_than_what_was_asked_for(objective, store):
    made = Fisher(objective.space, options(examples=1000, average=2, store=store))
    figures = made.update(objective, generator=torch.Generator())
    assert (figures["examples"], figures["rows"]) == (N, N / 2)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), float("inf")])
def test_a_damping_given_must_be_finite_and_above_zero(objective, damping):
    with pytest.raises(CurvatureError, match="a finite number above zero is needed"):
        estimator(objective).inverse(damping)


@pytest.mark.parametrize("damping", [1e-9, 1e-3, 1.0])
def test_moments_of_single_precision_rows_keep_their_digits(objective, damping):
    model = deepcopy(objective.model).float()
    batches = [(x.float(), y) for x, y in objective.batches]
    single = Objective(model, objective.likelihood, batches, objective.space)
    made = estimator(single, damping=damping, store="blocks", block_size=20)
    H = truth(all_rows(single).double(), objective.space.stretches(20), damping)
    assert_close(made.inverse().diagonal(), torch.linalg.inv(H).diagonal(), rtol=1e-3, atol=0)


def test_a_rest_of_rows_is_an_error(objective):
    with pytest.raises(ValueError, match="2 are left over"):
        list(averaged_rows([all_rows(objective)], 5))


@pytest.mark.parametrize("store", ["rows", "blocks"])
def test_another_damping_reuses_the_statistics(objective, store):
    made = estimator(objective, block_size=7, store=store)
    sizes = objective.space.stretches(7)
    assert_close(made.inverse(0.5).operator.dense(), torch.linalg.inv(truth(all_rows(objective), sizes, 0.5)))


@pytest.mark.parametrize("store", ["rows", "blocks"])
def test_relative_damping_is_of_the_mean_diagonal(objective, store):
    inverse = estimator(objective, damping=0.1, damping_scale="relative", store=store).inverse()
    assert inverse.damping == pytest.approx(0.1 * float(all_rows(objective).square().mean(0).mean()))


@pytest.mark.parametrize("store", ["rows", "blocks"])
def test_the_state_survives_a_round_trip(objective, store):
    first = estimator(objective, store=store)
    second = Fisher(objective.space, first.settings)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.inverse().diagonal(), second.inverse().diagonal())


@pytest.mark.parametrize("store", ["rows", "blocks"])
def test_the_diagonal_is_conditioned_on_removed_weights(objective, store):
    inverse = estimator(objective, block_size=20, store=store).inverse()
    kept = torch.arange(P) % 3 != 0
    H = truth(all_rows(objective), [20, 15], 1e-3)
    expected = torch.zeros(P, dtype=torch.float64)
    expected[kept] = torch.linalg.inv(H[kept][:, kept]).diagonal()
    assert_close(inverse.diagonal(Mask(kept)), expected)


def test_rows_may_lie_on_the_host(objective):
    made = estimator(objective, store="rows", rows_on="host")
    assert made.state_dict()["rows"].device.type == "cpu"
    assert isinstance(made.inverse().operator.parts[0], DiagonalPlusLowRank)


def test_decay_mixes_estimates(objective):
    once = estimator(objective, decay=0.5)
    before = once.state_dict()["blocks"].clone()
    once.update(objective, generator=torch.Generator())
    assert_close(once.state_dict()["blocks"], before)  # the same examples at the same weights


def test_nothing_seen_is_an_error(objective):
    with pytest.raises(CurvatureError, match="call update first"):
        Fisher(objective.space, options()).inverse()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"average": 5}, "must divide examples=12"),
        ({"fisher": "exact", "store": "rows"}, "several rows an example"),
        ({"fisher": "exact", "average": 2}, "several rows an example"),
        ({"decay": 0.5, "store": "rows"}, "start afresh"),
        ({"damping": 0}, "greater than 0"),
    ],
    ids=str,
)
def test_settings_that_contradict_one_another_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        options(**given)


def test_a_block_larger_than_memory_is_refused_with_the_size_that_fits(objective):
    made = options(block_size=None, across_layers=True, store="blocks", batch_size=1)
    needed = Fisher.memory(objective.space, made)
    with pytest.raises(SettingsError, match=r"'blocks' needs .* MiB .* estimator.block_size=(\d+)") as refused:
        Fisher.check(objective.model, objective.space, made, Memory(needed // 2, needed // 2))
    fits = int(str(refused.value).split("block_size=")[1].split()[0])
    assert 1 < fits < P
    assert Fisher.memory(objective.space, made.model_copy(update={"block_size": fits})) <= needed // 2
    assert Fisher.memory(objective.space, made.model_copy(update={"block_size": fits + 1})) > needed // 2


def paged(**given):
    """Settings with rows, the bytes of the rows, and of what must lie on the device beside them."""
    space = ParameterSpace({"weight": (1, 100_000)})
    made = options(block_size=None, store="rows", batch_size=1, examples=200, **given)
    rows = 4 * 200 * space.size
    return space, made, rows, Fisher.memory(space, made) - rows


def test_rows_that_fit_the_host_are_paged_rather_than_refused():
    space, made, rows, beside = paged()
    Fisher.check(nn.Module(), space, made, Memory(device=beside, host=rows))


def test_rows_that_are_to_lie_on_the_device_must_fit_there():
    space, made, rows, beside = paged(rows_on="device")
    with pytest.raises(SettingsError, match=r"estimator.examples=\d"):
        Fisher.check(nn.Module(), space, made, Memory(device=beside, host=10 * rows))


def test_rows_that_do_not_fit_the_host_are_refused():
    space, made, rows, beside = paged(rows_on="host")
    with pytest.raises(SettingsError, match=r"of host memory .* estimator.examples=199"):
        Fisher.check(nn.Module(), space, made, Memory(device=beside, host=rows - 1))


def test_what_lies_beside_paged_rows_must_fit_the_device():
    space, made, rows, beside = paged(rows_on="host")
    with pytest.raises(SettingsError, match="of device memory"):
        Fisher.check(nn.Module(), space, made, Memory(device=beside - 1, host=rows))


def test_without_an_accelerator_rows_and_factors_share_one_memory():
    space, made, rows, beside = paged()
    with pytest.raises(SettingsError, match="MiB of memory"):
        Fisher.check(nn.Module(), space, made, Memory(rows + beside - 1, rows + beside - 1))


@pytest.mark.parametrize(("rows_on", "name", "where"), [("host", "rows", "cpu"), ("device", "rows", "meta")])
def test_restored_rows_lie_where_they_were_kept(objective, rows_on, name, where):
    made = Fisher(objective.space, options(block_size=None, store="rows", rows_on=rows_on))
    assert made.state_device(name, torch.ones(N, P), torch.device("meta")) == torch.device(where)


def test_what_is_restored_beside_the_rows_lies_with_the_model(objective):
    made = Fisher(objective.space, options(store="rows", rows_on="host"))
    assert made.state_device("mean_diagonal", torch.ones(()), torch.device("meta")) == torch.device("meta")


@pytest.mark.gpu
def test_rows_restored_to_the_host_are_paged_to_the_model(objective, accelerator):
    first, second = (Fisher(objective.space, options(store="rows", rows_on="host")) for _ in range(2))
    first.update(objective, generator=torch.Generator().manual_seed(0))
    state = first.state_dict()
    second.load_state_dict({k: t.to(second.state_device(k, t, accelerator)) for k, t in state.items()})
    assert second.inverse().operator.device.type == accelerator.type
    assert_close(second.inverse().diagonal().cpu(), first.inverse().diagonal())


@pytest.mark.parametrize("mine", [1e-8, 1e-5, 1e-4, 1e-3, 1.0])
@pytest.mark.parametrize("other", [1e-8, 1e-5, 1e-4, 1e-3, 1.0])
def test_single_precision_statistics_are_adopted_where_the_damping_asks_for_the_same_precision(objective, mine, other):
    single = replace(
        objective,
        model=deepcopy(objective.model).float(),
        batches=[(inputs.float(), targets) for inputs, targets in objective.batches],
    )
    own = estimator(single, block_size=7, damping=mine, store="blocks")
    adopting = Fisher(single.space, options(block_size=7, damping=mine, store="blocks"))
    source = estimator(single, block_size=7, damping=other, store="blocks")
    if adopting.adopt(source.state_dict()):
        assert torch.equal(adopting.state_dict()["blocks"], own.state_dict()["blocks"])
    else:
        assert mine != other
        assert not torch.equal(source.state_dict()["blocks"], own.state_dict()["blocks"])


def test_both_precisions_are_met_above(objective):
    single = replace(
        objective,
        model=deepcopy(objective.model).float(),
        batches=[(inputs.float(), targets) for inputs, targets in objective.batches],
    )
    flags = [estimator(single, damping=g, store="blocks").state_dict()["judged"][-1] for g in (1e-8, 1.0)]
    assert [bool(flag) for flag in flags] == [False, True]
