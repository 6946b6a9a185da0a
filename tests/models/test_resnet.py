import pytest
import torch
from torch.testing import assert_close

from sparsekit.models import DigitsNet, resnet


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return resnet(20).eval()


# The counts that akamaster/pytorch_resnet_cifar10 prints for its networks.
@pytest.mark.parametrize("depth, count", [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_parameters_are_as_many_as_published(depth, count):
    assert sum(p.numel() for p in resnet(depth).parameters()) == count


def test_names_are_those_of_published_checkpoints(network):
    blocks = [f"layer{s}.{i}.{name}" for s in (1, 2, 3) for i in range(3) for name in ("conv1", "bn1", "conv2", "bn2")]
    names = {name.rsplit(".", 1)[0] for name in network.state_dict()}
    assert names == {"conv1", "bn1", "linear", *blocks}


def test_logits_have_one_column_a_class(network):
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_shortcut_subsamples_and_pads_channels_on_both_sides(network):
    block = network.layer2[0]
    x = torch.rand(2, 16, 8, 8)
    # Zero weights after the second norm leave the shortcut alone; inputs are positive, so the rectifier is too.
    scale, shift = block.bn2.weight.detach().clone(), block.bn2.bias.detach().clone()
    with torch.no_grad():
        block.bn2.weight.zero_()
        block.bn2.bias.zero_()
        y = block(x)
        block.bn2.weight.copy_(scale)
        block.bn2.bias.copy_(shift)
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    assert_close(y, expected)


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=rf"6k \+ 2 was needed, {depth} was given"):
        resnet(depth)


def test_digits_network_is_small():
    assert 20_000 <= sum(p.numel() for p in DigitsNet().parameters()) <= 40_000


def test_digits_network_gives_ten_logits():
    assert DigitsNet().eval()(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
