import pytest
import torch
from torch import nn

from sparsekit.replay import Replay


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


def learnt(model, x, limit=1 << 20):
    replay = Replay(model, limit)
    replay.__enter__()
    model(x)
    replay.learn()
    for module in model.modules():
        if isinstance(module, Counted):
            module.count = 0
    return replay


def counts(model):
    return [module.count for module in model.modules() if isinstance(module, Counted)]


def test_what_is_settled_is_not_computed_again():
    model, x = network(), torch.randn(2, 3)
    expected = model(x)
    with learnt(model, x):
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
        assert counts(model) == [1] * 5


def test_what_comes_after_the_unsettled_is():
    model, x = network(), torch.randn(2, 3)
    with learnt(model, x) as replay:
        model[2].register_forward_pre_hook(lambda module, args: setattr(replay, "settled", False))
        model(x)
        model(x)
        assert counts(model) == [1, 1, 1, 2, 2]


def test_batches_are_kept_apart():
    model, x = network(), torch.randn(2, 3)
    with learnt(model, x) as replay:
        first = model(x)
        replay.batch = 1
        assert not torch.equal(model(x + 1), first)
        replay.batch = 0
        assert torch.equal(model(x), first)


def test_only_the_outermost_module_is_kept():
    model, x = network(), torch.randn(2, 3)
    with learnt(model, x) as replay:
        model(x)
        assert {name for _, name in replay._kept} == {"0", "1", "2", "3"}


@pytest.mark.parametrize("limit", [0, 30])
def test_without_room_the_result_is_the_same(limit):
    model, x = network(), torch.randn(2, 3)
    expected = model(x)
    with learnt(model, x, limit) as replay:
        model(x)
        assert torch.equal(model(x), expected)
        assert replay._bytes <= limit


def test_a_module_that_runs_twice_is_computed_each_time():
    shared = Counted()
    model, x = nn.Sequential(shared, nn.ReLU(), shared), torch.randn(2, 3)
    expected = model(x)
    with learnt(model, x):
        model(x)
        assert torch.equal(model(x), expected)
        assert shared.count == 4


def test_work_in_place_does_not_reach_what_is_kept():
    model, x = nn.Sequential(Counted(), Counted(lambda x: x.add_(1))), torch.randn(2, 3)
    expected = model(x)
    with learnt(model, x):
        for _ in range(3):
            assert torch.equal(model(x), expected)


def test_after_forgetting_all_is_computed():
    model, x = network(), torch.randn(2, 3)
    with learnt(model, x) as replay:
        model(x)
        replay.forget()
        model(x)
        assert counts(model) == [2] * 5


def test_the_modules_are_left_as_they_were():
    model = network()
    model[3].forward = forward = lambda x: x
    with Replay(model, 100):
        pass
    assert "forward" not in model[0].__dict__
    assert model[3].forward is forward
