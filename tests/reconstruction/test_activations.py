import pytest
import torch
from torch import nn

from sparsekit.reconstruction.activations import Replay


class Counted(nn.Module):
    def __init__(self, change=lambda x: x + 1):
        super().__init__()
        self.count, self._change = 0, change

    def forward(self, x):
        self.count += 1
        return self._change(x)


def network():
    inner = nn.Sequential(Counted(), nn.ReLU(inplace=True), Counted())
    return nn.Sequential(Counted(), inner, Counted(), Counted())


def replaying(model, limit=1 << 20):
    replay = Replay(model, limit)
    replay.begin(0)
    return replay


def again(model, replay, x, batch=0):
    replay.begin(batch)
    return model(x)


def counts(model):
    return [module.count for module in model.modules() if isinstance(module, Counted)]


def test_what_is_settled_is_not_computed_again():
    model, x = network(), torch.randn(2, 3)
    expected = model(x)
    with replaying(model) as replay:
        for _ in range(3):
            assert torch.equal(again(model, replay, x), expected)
    assert counts(model) == [2] * 5


def test_what_comes_after_the_unsettled_is():
    model, x = network(), torch.randn(2, 3)
    with replaying(model) as replay:
        model[2].register_forward_pre_hook(lambda module, args: setattr(replay, "settled", False))
        again(model, replay, x)
        again(model, replay, x)
    assert counts(model) == [1, 1, 1, 2, 2]


def test_batches_are_kept_apart():
    model, x = network(), torch.randn(2, 3)
    with replaying(model) as replay:
        first = again(model, replay, x)
        assert not torch.equal(again(model, replay, x + 1, batch=1), first)
        assert torch.equal(again(model, replay, x), first)


def test_without_a_batch_all_is_computed_and_nothing_kept():
    model, x = network(), torch.randn(2, 3)
    expected = model(x + 1)
    with replaying(model) as replay:
        again(model, replay, x)
        replay.batch = None
        assert torch.equal(model(x + 1), expected)
        assert counts(model) == [3] * 5


def test_only_the_outermost_module_is_kept():
    model, x = network(), torch.randn(2, 3)
    with replaying(model) as replay:
        again(model, replay, x)
        assert set(replay._kept[0]) == {"0", "1", "2", "3"}


@pytest.mark.parametrize("limit", [0, 30, 60])
def test_without_room_the_result_is_the_same(limit):
    model, x = network(), torch.randn(2, 3)
    expected = model(x)
    with replaying(model, limit) as replay:
        again(model, replay, x)
        assert torch.equal(again(model, replay, x), expected)
        assert replay._bytes == sum(kept.size for kept in replay._kept[0].values()) <= limit


def test_what_other_batches_keep_is_not_given_up_for_one():
    model, x = network(), torch.randn(2, 3)
    with replaying(model, 4 * x.nbytes) as replay:
        again(model, replay, x)
        again(model, replay, x, batch=1)
        assert len(replay._kept[0]) == 4
        assert not replay._kept[1]


def test_a_module_that_runs_twice_is_computed_each_time():
    shared = Counted()
    model, x = nn.Sequential(shared, nn.ReLU(), shared), torch.randn(2, 3)
    expected = model(x)
    with replaying(model) as replay:
        for _ in range(2):
            assert torch.equal(again(model, replay, x), expected)
    assert shared.count == 6


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.times = Counted(), 1

    def forward(self, x):
        for _ in range(self.times):
            x = self.inner(x)
        return x


def test_a_module_that_runs_once_at_first_and_twice_later_is_not_kept_any_more():
    model, x = Sometimes(), torch.randn(2, 3)
    with replaying(model) as replay:
        once = again(model, replay, x)
        model.times = 2
        assert torch.equal(again(model, replay, x, batch=1), x + 1 + 1)
        model.times = 1
        assert torch.equal(again(model, replay, x), once)


def test_work_in_place_does_not_reach_what_is_kept():
    model, x = nn.Sequential(Counted(), Counted(lambda x: x.add_(1))), torch.randn(2, 3)
    expected = model(x)
    with replaying(model) as replay:
        for _ in range(3):
            assert torch.equal(again(model, replay, x), expected)


class InPlace(nn.Module):
    """The activation changes what the shortcut takes."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = Counted(), nn.ReLU(inplace=True), Counted()

    def forward(self, x):
        y = self.first(x)
        return self.last(self.act(y)) + y


def test_modules_that_write_to_their_arguments_are_computed_again():
    model, x = InPlace(), torch.randn(2, 3)
    expected = model(x)
    with replaying(model) as replay:
        for _ in range(3):
            assert torch.equal(again(model, replay, x), expected)
    assert counts(model) == [2, 2]


def test_after_forgetting_all_is_computed():
    model, x = network(), torch.randn(2, 3)
    with replaying(model) as replay:
        again(model, replay, x)
        replay.forget()
        again(model, replay, x)
    assert counts(model) == [2] * 5


def test_the_modules_are_left_as_they_were():
    model = network()
    model[3].forward = forward = lambda x: x
    with Replay(model, 100):
        pass
    assert "forward" not in model[0].__dict__
    assert model[3].forward is forward
