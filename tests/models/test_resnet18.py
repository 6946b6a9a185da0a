import pytest
import torch
from torch import nn

from sparsekit.models import resnet18


@pytest.fixture(scope="module")
def network():
    return resnet18(10).eval()


def test_parameters_are_as_many_as_published(network):
    # kuangliu/pytorch-cifar's ResNet18
    assert sum(p.numel() for p in network.parameters()) == 11_173_962


@pytest.mark.parametrize("side", [32, 64])
def test_stages_halve_the_image(network, side):
    sides = []
    hooks = [
        getattr(network, f"layer{k}").register_forward_hook(lambda m, i, o: sides.append(o.shape[-1]))
        for k in (1, 2, 3, 4)
    ]
    assert network(torch.zeros(1, 3, side, side)).shape == (1, 10)
    for hook in hooks:
        hook.remove()
    assert sides == [side, side // 2, side // 4, side // 8]


def test_stem_is_drawn_as_the_other_convolutions(network):
    spread = {
        name: float(m.weight.detach().std()) * (9 * m.out_channels / 2) ** 0.5
        for name, m in network.named_modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    }
    assert spread["conv1"] == pytest.approx(1, abs=0.1)
    assert all(value == pytest.approx(1, abs=0.1) for value in spread.values())
