"""The networks of Laurent et al., 2020."""

import pytest
import torch
from torch import nn

from sparsekit.models import lenet, preact_resnet18, vgg11


@pytest.mark.parametrize(
    ("network", "count", "shape"),
    [
        (lambda: lenet("mlp-300-100-tanh"), 266_610, (1, 28, 28)),
        (lambda: vgg11(10), 9_225_610, (3, 32, 32)),
        # kuangliu/pytorch-cifar's PreActResNet18 (11,171,146), and the norm before the last layer, which it leaves out
        (lambda: preact_resnet18(10), 11_171_146 + 2 * 512, (3, 32, 32)),
    ],
    ids=["mlp", "vgg11", "preact-resnet18"],
)
def test_sizes_are_as_published(network, count, shape):
    made = network().eval()
    assert sum(p.numel() for p in made.parameters()) == count
    assert made(torch.zeros(2, *shape)).shape == (2, 10)


def test_the_perceptron_has_hyperbolic_tangents():
    assert sum(isinstance(m, nn.Tanh) for m in lenet("mlp-300-100-tanh")) == 2


def test_vgg11_has_no_batch_normalisation():
    assert not any(isinstance(m, nn.BatchNorm2d) for m in vgg11(10).modules())


def test_a_block_is_its_formula():
    block = preact_resnet18(10).eval().blocks[2]  # 64 -> 128 channels at half the side
    x = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    active = torch.relu(block.bn1(x))
    by_hand = block.shortcut(active) + block.conv2(torch.relu(block.bn2(block.conv1(active))))
    assert torch.equal(block(x), by_hand)
    assert block(x).shape == (2, 128, 4, 4)
