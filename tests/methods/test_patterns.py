import pytest
import torch

from sparsekit.errors import SettingsError
from sparsekit.methods.interfaces import Settings
from sparsekit.methods.patterns import (
    NM,
    Block,
    BlockSettings,
    FloorSettings,
    NMSettings,
    Uniform,
    Unstructured,
    floors,
    lowest,
)
from sparsekit.problem.parameters import Mask, ParameterSpace

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


FLOORED = {
    "unstructured": lambda floor: Unstructured(FloorSettings(floor=floor)),
    "uniform": lambda floor: Uniform(FloorSettings(floor=floor)),
    "block": lambda floor: Block(BlockSettings(size=2, floor=floor)),
}


def test_a_floor_is_a_fraction_of_the_even_share_rounded_up():
    assert floors([100, 50, 4], 77, 0.2) == [10, 5, 1]
    assert floors([100, 50, 4], 77, 0.0) == [0, 0, 0]


def test_floors_never_ask_for_more_than_is_left():
    assert floors([1000, 1, 1, 1], 3, 0.5) == [1, 0, 0, 0]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("floor", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("name", FLOORED)
def test_counts_are_exact_and_no_tensor_falls_below_its_floor_on_any_path(name, floor, seed):
    draw = torch.Generator().manual_seed(seed)
    shapes = torch.randint(1, 8, (int(torch.randint(2, 8, (1,), generator=draw)), 2), generator=draw)
    space = ParameterSpace({f"t{i}": (int(a), 2 * int(b)) for i, (a, b) in enumerate(shapes)})
    pattern, mask = FLOORED[name](floor), Mask.full(space.size)
    scale = torch.cat([torch.full((info.size,), 10.0 ** (i % 3)) for i, info in enumerate(space.parameters)])
    for sparsity in torch.rand(6, generator=draw, dtype=torch.float64).sort().values.tolist():
        count = pattern.count(space, sparsity)
        picked = pattern.choose(scale * torch.rand(space.size, generator=draw), mask, count, space)
        assert not (picked & mask.removed).any()
        mask = mask.without(picked)
        assert mask.removed_count == count
        unit = 2 if name == "block" else 1
        least = floors([info.size // unit for info in space.parameters], (space.size - count) // unit, floor)
        kept = [int(mask.kept[info.slice].sum()) // unit for info in space.parameters]
        assert all(stays >= stay for stays, stay in zip(kept, least, strict=True))


@pytest.mark.parametrize("name", FLOORED)
def test_a_tensor_that_an_earlier_cut_took_below_its_floor_loses_no_more_and_gets_nothing_back(name):
    space = ParameterSpace({"a": (4, 10), "b": (8, 10)})
    before = torch.zeros(space.size, dtype=torch.bool)
    before[:38] = True  # two of forty are left of "a"
    pattern = FLOORED[name](0.5)
    count = pattern.count(space, 0.7)
    picked = pattern.choose(torch.arange(space.size, dtype=torch.float), Mask(~before), count, space)
    assert not picked[:40].any()
    assert int((picked | before).sum()) == count


def test_above_the_floors_the_lowest_go_and_ties_by_index():
    space = ParameterSpace({"a": (2, 10), "b": (2, 10)})
    scores = torch.cat([torch.zeros(20), torch.ones(20)])
    removed = Unstructured(FloorSettings(floor=0.5)).choose(scores, Mask.full(40), 24, space)
    # 16 stay, of each at least half of 8
    assert removed.nonzero()[:, 0].tolist() == [*range(16), *range(20, 28)]


def test_without_a_floor_a_tensor_may_go_whole():
    space = ParameterSpace({"a": (2, 10), "b": (2, 10)})
    scores = torch.cat([torch.zeros(20), torch.ones(20)])
    removed = Unstructured(FloorSettings(floor=0)).choose(scores, Mask.full(40), 24, space)
    assert removed[:20].all()


def test_a_tensor_of_few_weights_keeps_one_in_a_uniform_cut():
    space = ParameterSpace({"a": (2, 2), "b": (20, 20)})
    pattern = Uniform(FloorSettings())
    count = pattern.count(space, 0.95)
    removed = pattern.choose(torch.zeros(space.size), Mask.full(space.size), count, space)
    assert int(removed[:4].sum()) == 3
    assert int(removed.sum()) == count


def test_a_last_layer_of_low_scores_survives_the_default_cut():
    space = ParameterSpace({"first": (200, 20), "head": (2, 200)})
    scores = torch.cat([1 + torch.rand(4000), torch.rand(400)])
    removed = Unstructured(FloorSettings()).choose(scores, Mask.full(4400), 3960, space)
    assert int((~removed)[space["head"].slice].sum()) == 8
    assert int(removed.sum()) == 3960
