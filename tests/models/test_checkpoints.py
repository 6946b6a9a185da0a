import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparsekit.errors import DataError
from sparsekit.models import load_checkpoint, resnet


@pytest.fixture
def model():
    return nn.Linear(3, 2)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
def test_a_torch_file(model, tmp_path, wrap):
    other = nn.Linear(3, 2)
    torch.save(wrap(other.state_dict()), tmp_path / "dense.th")
    load_checkpoint(model, tmp_path / "dense.th")
    assert torch.equal(model.weight, other.weight)


def test_a_safetensors_file(model, tmp_path):
    other = nn.Linear(3, 2)
    save_file(other.state_dict(), tmp_path / "dense.safetensors")
    load_checkpoint(model, tmp_path / "dense.safetensors")
    assert torch.equal(model.weight, other.weight)


def test_a_missing_file(model, tmp_path):
    with pytest.raises(DataError, match="there is no checkpoint file"):
        load_checkpoint(model, tmp_path / "no.th")


def test_a_file_that_is_no_checkpoint(model, tmp_path):
    (tmp_path / "x.th").write_text("hello")
    with pytest.raises(DataError, match="cannot be read as a checkpoint"):
        load_checkpoint(model, tmp_path / "x.th")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(2, 3)}, "missing: bias"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "more": torch.zeros(1)}, "not in the model: more"),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, r"has shape \(2, 4\), \(2, 3\) was needed"),
        ({"weight": torch.full((2, 3), torch.nan), "bias": torch.zeros(2)}, "not finite"),
        ({"epoch": 3}, "holds no state dict"),
    ],
)
def test_a_checkpoint_that_does_not_fit(model, tmp_path, state, message):
    torch.save(state, tmp_path / "x.th")
    with pytest.raises(DataError, match=message):
        load_checkpoint(model, tmp_path / "x.th")


def test_resnet20_has_its_published_size():
    assert sum(p.numel() for p in resnet(20).parameters()) == 269722
