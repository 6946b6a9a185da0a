import pytest

from sparsekit.methods.interfaces import Settings
from sparsekit.methods.schedules import Cubic, Exponential, Linear, OneShot, plan

ALL = [Cubic(Settings()), Exponential(Settings()), Linear(Settings()), OneShot(Settings())]


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
def test_a_schedule_rises_to_its_target_exactly(schedule):
    values = [0.2, *schedule.sparsities(0.2, 0.9, 5)]
    assert values[-1] == 0.9
    assert all(a < b for a, b in zip(values, values[1:], strict=False))


def test_cubic_halfway():
    assert Cubic(Settings()).sparsities(0.0, 0.8, 2)[0] == pytest.approx(0.8 * (1 - 0.125))


def test_exponential_keeps_the_same_fraction_at_each_step():
    kept = [1 - s for s in Exponential(Settings()).sparsities(0.0, 0.9, 4)]
    ratios = [b / a for a, b in zip([1.0, *kept], kept, strict=False)]
    assert ratios == pytest.approx([0.1**0.25] * 4)


def test_linear_halfway():
    assert Linear(Settings()).sparsities(0.2, 0.6, 2)[0] == pytest.approx(0.4)


def test_one_shot_levels_restart_and_share_the_curvature():
    steps = plan([0.5, 0.9], OneShot(Settings()), independent=True)
    assert [s.restart for s in steps] == [True, True]
    assert [s.refresh for s in steps] == [True, False]
    assert [s.level for s in steps] == [0, 1]


def test_sequential_levels_continue_where_the_last_one_ended():
    steps = plan([0.5, 0.9], Linear(Settings()), steps=2)
    assert [s.sparsity for s in steps] == pytest.approx([0.25, 0.5, 0.7, 0.9])
    assert not any(s.restart for s in steps)


def test_substeps_refresh_before_each_cut_and_finetune_after_the_last():
    steps = plan([0.9], OneShot(Settings()), substeps=3, finetune=True)
    assert [s.refresh for s in steps] == [True] * 3
    assert [s.finetune for s in steps] == [False, False, True]
    assert [s.completes_level for s in steps] == [False, False, True]


def test_independent_levels_with_substeps_refresh_where_the_weights_have_moved():
    steps = plan([0.5, 0.9], OneShot(Settings()), substeps=2, independent=True)
    assert [s.refresh for s in steps] == [True, True, True, True]


def test_substeps_may_be_spaced_evenly():
    even = plan([0.9], OneShot(Settings()), substeps=3, spacing=Linear(Settings()))
    assert [s.sparsity for s in even] == pytest.approx([0.3, 0.6, 0.9])
    assert [s.sparsity for s in plan([0.9], OneShot(Settings()), substeps=2)] == pytest.approx([1 - 0.1**0.5, 0.9])
