import pytest
import torch

from sparsekit.errors import SettingsError
from sparsekit.interfaces import Settings
from sparsekit.parameters import Mask, ParameterSpace
from sparsekit.patterns import NM, Block, BlockSettings, NMSettings, Uniform, Unstructured, lowest

SPACE = ParameterSpace({"a": (4, 8), "b": (3, 5), "c": (2, 3)})


def chosen(pattern, sparsity, mask=None, seed=0):
    scores = torch.rand(SPACE.size, generator=torch.Generator().manual_seed(seed))
    mask = mask or Mask.full(SPACE.size)
    return pattern.choose(scores, mask, pattern.count(SPACE, sparsity), SPACE), scores


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.333, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("pattern", [Unstructured(Settings()), Uniform(Settings())], ids=lambda p: p.name)
def test_exactly_the_feasible_number_is_removed(pattern, sparsity):
    removed, _ = chosen(pattern, sparsity)
    assert int(removed.sum()) == pattern.count(SPACE, sparsity)


def test_unstructured_counts_round_of_s_times_n():
    assert Unstructured(Settings()).count(SPACE, 0.5) == round(0.5 * 53)


def test_unstructured_takes_the_lowest():
    removed, scores = chosen(Unstructured(Settings()), 0.5)
    assert scores[removed].max() < scores[~removed].min()


def test_ties_are_broken_by_index():
    picked = lowest(torch.zeros(6), torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool), 3)
    assert picked.tolist() == [True, True, False, True, False, False]


def test_removed_weights_are_not_chosen_again():
    before, _ = chosen(Unstructured(Settings()), 0.4)
    mask = Mask(~before)
    again, _ = chosen(Unstructured(Settings()), 0.7, mask, seed=1)
    assert not (again & before).any()
    assert int((again | before).sum()) == round(0.7 * SPACE.size)


def test_uniform_removes_the_same_fraction_of_each_tensor():
    removed, _ = chosen(Uniform(Settings()), 0.5)
    shares = [int(removed[info.slice].sum()) for info in SPACE.parameters]
    assert shares == [16, 8, 3]


@pytest.mark.parametrize("seed", range(200))
def test_uniform_is_exact_and_takes_back_nothing_on_any_path(seed):
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, 40, (int(torch.randint(2, 12, (1,), generator=draw)),), generator=draw)
    space = ParameterSpace({f"t{i}": (int(size), 1) for i, size in enumerate(rows)})
    pattern, mask = Uniform(Settings()), Mask.full(space.size)
    for sparsity in torch.rand(12, generator=draw, dtype=torch.float64).sort().values.tolist():
        count = pattern.count(space, sparsity)
        picked = pattern.choose(torch.rand(space.size, generator=draw), mask, count, space)
        assert not (picked & mask.removed).any()
        mask = mask.without(picked)
        assert mask.removed_count == count


def test_uniform_spreads_evenly_what_a_tensor_has_lost_too_much_of():
    before = torch.zeros(SPACE.size, dtype=torch.bool)
    before[SPACE["a"].slice] = True  # all 32 of it, twice its share
    removed, _ = chosen(Uniform(Settings()), 0.7, Mask(~before))
    assert [int(removed[info.slice].sum()) for info in SPACE.parameters] == [0, 3, 1]  # 36 in all


def test_two_of_four_stay_in_every_whole_group():
    removed, _ = chosen(NM(NMSettings()), 0.5)
    groups = removed[:32].view(-1, 4)
    assert (groups.sum(1) == 2).all()


def test_a_short_group_stays_whole():
    removed, _ = chosen(NM(NMSettings()), 0.5)
    rows = removed[32:47].view(3, 5)
    assert not rows[:, 4].any()
    assert not removed[47:].any()


def test_n_of_m_on_the_way_never_takes_more_than_a_group_allows():
    pattern = NM(NMSettings())
    first, _ = chosen(pattern, 0.3)
    second, _ = chosen(pattern, 0.5, Mask(~first), seed=3)
    assert ((first | second)[:32].view(-1, 4).sum(1) == 2).all()


def test_more_than_the_pattern_allows_is_refused():
    with pytest.raises(SettingsError, match=r"2:4 removes at most 0.5 of the weights, 0.6 was asked for"):
        NM(NMSettings()).count(SPACE, 0.6)


def test_units_are_the_whole_groups_of_an_outputs_inputs():
    units = NM(NMSettings(n=1, m=4)).units(SPACE)
    assert units.removed == 3
    assert units.index.tolist()[:3] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert len(units.index) == 4 * 2 + 3 * 1  # "c" is too narrow
    assert units.index[8].tolist() == [32, 33, 34, 35]


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.83])
def test_whole_blocks_go(sparsity):
    pattern = Block(BlockSettings(size=4))
    removed, scores = chosen(pattern, sparsity)
    groups = pattern.units(SPACE).index
    gone = removed[groups]
    assert (gone.all(1) == gone.any(1)).all()
    assert int(removed.sum()) == pattern.count(SPACE, sparsity) == 4 * round(sparsity * 53 / 4)
    sums = scores[groups].sum(1)
    if gone.any() and not gone.all():
        assert sums[gone.all(1)].max() < sums[~gone.all(1)].min()


def test_blocks_removed_before_count():
    pattern = Block(BlockSettings(size=4))
    before, _ = chosen(pattern, 0.4)
    after, _ = chosen(pattern, 0.8, Mask(~before))
    assert not (before & after).any()
    assert int((before | after).sum()) == pattern.count(SPACE, 0.8)


def test_no_block_anywhere_is_refused():
    with pytest.raises(SettingsError, match="no block of 64"):
        Block(BlockSettings(size=64)).count(SPACE, 0.5)


def test_no_group_anywhere_is_refused():
    with pytest.raises(SettingsError, match="no tensor has 64 inputs to an output, so the pattern 32:64 has no group"):
        NM(NMSettings(n=32, m=64)).count(SPACE, 0.5)


def test_n_of_m_on_the_way_does_not_compare_tensors():
    scores = torch.rand(SPACE.size, generator=torch.Generator().manual_seed(0))
    pattern, other = NM(NMSettings()), scores.clone()
    other[SPACE["a"].slice] *= 1000  # another layer's unit
    count = pattern.count(SPACE, 0.2)
    first, second = (pattern.choose(s, Mask.full(SPACE.size), count, SPACE) for s in (scores, other))
    assert torch.equal(first, second)
    assert int(first.sum()) == count


@pytest.mark.parametrize("seed", range(50))
def test_n_of_m_is_exact_on_any_path(seed):
    draw = torch.Generator().manual_seed(seed)
    pattern, mask = NM(NMSettings(n=1, m=3)), Mask.full(SPACE.size)
    for sparsity in [*(0.6 * torch.rand(5, generator=draw, dtype=torch.float64)).sort().values.tolist(), 0.66]:
        count = pattern.count(SPACE, sparsity)
        mask = mask.without(pattern.choose(torch.rand(SPACE.size, generator=draw), mask, count, SPACE))
        assert mask.removed_count == count
    assert (mask.removed[pattern.units(SPACE).index].sum(1) <= 2).all()
