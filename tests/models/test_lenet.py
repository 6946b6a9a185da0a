import pytest
import torch

from sparsekit.models import lenet


# The counts of Han et al. (2015).
@pytest.mark.parametrize("architecture, count", [("lenet5", 431_080), ("lenet-300-100", 266_610)])
def test_parameters_are_as_many_as_published(architecture, count):
    assert sum(p.numel() for p in lenet(architecture).parameters()) == count


@pytest.mark.parametrize("architecture", ["lenet5", "lenet-300-100"])
def test_logits_have_one_column_a_class(architecture):
    assert lenet(architecture)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
