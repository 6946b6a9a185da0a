import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models import resnet50

from sparsekit import Categorical, Objective, ParameterSpace, SettingsError
from sparsekit.testing import dense_fisher
from sparsekit_fishleg import FishLeg, View, structure_of
from sparsekit_fishleg.blocks import Block
from sparsekit_fishleg.settings import FishLegSettings
from sparsekit_fishleg.structures import view


def views(model, structure="eigenbasis", max_factor=8192, dense_below=0, include=None):
    space = ParameterSpace.of(model, include=include)
    return {
        info.name: view(info, structure, max_factor=max_factor, dense_below=dense_below) for info in space.parameters
    }


@pytest.mark.parametrize(
    ("layer", "structure", "expected"),
    [
        (nn.Linear(5, 3), "eigenbasis", View(1, (3, 5))),
        (nn.Conv1d(4, 6, 3), "eigenbasis", View(1, (6, 12))),
        (nn.Conv2d(4, 6, 3), "kronecker", View(1, (6, 36))),
        (nn.Conv2d(4, 6, 3), "three-factor", View(1, (6, 4, 9))),
        (nn.Conv2d(4, 6, 1), "three-factor", View(1, (6, 4))),
        (nn.Conv2d(4, 6, 3, groups=2), "eigenbasis", View(2, (3, 18))),
        (nn.Conv2d(4, 6, 3, groups=2), "three-factor", View(2, (3, 2, 9))),
        (nn.Conv2d(4, 4, 3, groups=4), "eigenbasis", View(4, (9,))),
        (nn.Conv2d(4, 6, 3), "blocks", View(6, (36,))),
        (nn.Linear(5, 3), "dense", View(1, (15,))),
        (nn.Linear(5, 3), "diagonal", View(1, (15,), (False,))),
        (nn.Embedding(7, 4), "eigenbasis", View(1, (7, 4), (False, True))),
        (nn.Bilinear(2, 3, 4), "eigenbasis", View(1, (24,), (False,))),
    ],
    ids=str,
)
def test_weights_by_layer(layer, structure, expected):
    assert views(layer, structure)["weight"] == expected


def test_packed_attention_is_three_projections():
    found = views(nn.MultiheadAttention(6, 2))
    assert found["in_proj_weight"] == View(3, (6, 6)) and found["out_proj.weight"] == View(1, (6, 6))


def test_separate_attention_projections():
    found = views(nn.MultiheadAttention(6, 2, kdim=4, vdim=5))
    assert [found[f"{x}_proj_weight"] for x in "qkv"] == [View(1, (6, d)) for d in (6, 4, 5)]


def test_norms_and_biases_are_diagonal():
    found = views(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), include=["*"])
    assert [found[n] for n in ("0.bias", "1.weight", "1.bias")] == [View(1, (3,), (False,))] * 3


def test_long_sides_have_no_factor():
    assert views(nn.Linear(20, 3), max_factor=10)["weight"] == View(1, (3, 20), (True, False))


def test_tiny_tensors_are_dense_where_asked_for():
    found = views(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 20)), dense_below=6)
    assert found == {"0.weight": View(1, (6,)), "1.weight": View(1, (20, 3))}


def test_a_dense_block_that_is_too_long():
    with pytest.raises(SettingsError, match="a factor of side 60 .*max_factor=60"):
        views(nn.Linear(20, 3), "dense", max_factor=10)


def test_a_layer_of_ones_own():
    class PerPosition(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3, 4, dtype=torch.float64))

        def forward(self, x):
            return torch.einsum("poi,bpi->bo", self.weight, x)

    model = PerPosition()
    assert views(model)["weight"] == View(1, (24,), (False,))

    @structure_of(PerPosition)
    def by_position(info):
        return View(info.shape[0], info.shape[1:])

    batch = torch.randn(40, 2, 4, dtype=torch.float64), torch.arange(40) % 3
    objective = Objective(model, Categorical(), [batch], ParameterSpace.of(model))
    made = FishLeg(objective.space, FishLegSettings(fisher="exact", auxiliary_steps=0))
    made.update(objective, generator=torch.Generator().manual_seed(0))
    found = torch.linalg.inv(made.inverse().operator.dense())
    truth = dense_fisher(objective, "exact")
    assert (found[:12, 12:] == 0).all()
    assert (found[:12, :12] - truth[:12, :12]).norm() < 0.6 * truth[:12, :12].norm()


def test_a_view_of_another_size_is_refused():
    class Wrong(nn.Linear):
        pass

    structure_of(Wrong)(lambda info: View(1, (2, 2)))
    with pytest.raises(SettingsError, match="a View of its 15 weights was needed"):
        views(Wrong(5, 3))


@pytest.mark.parametrize("structure", ["kronecker", "outer"])
def test_a_rank_one_spectrum_is_met_exactly(structure):
    block = Block(View(2, (3, 4)), structure)
    scales = [torch.rand(2, d, dtype=torch.float64) + 0.5 for d in (3, 4)]
    for i, d in enumerate((3, 4)):
        block.state[f"basis{i}"] = torch.linalg.qr(torch.randn(2, d, d, dtype=torch.float64)).Q
    inverse = scales[0][:, :, None] * scales[1][:, None, :]
    block.state["spectrum"] = 1 / inverse - 0.1
    block.closed_form(0.1)
    assert_close(block.state["q"], inverse)


def test_the_outer_diagonal_gives_q_the_diagonal_of_the_full_spectrum():
    outer, full = Block(View(1, (3, 4)), "outer"), Block(View(1, (3, 4)), "eigenbasis")
    for i, d in enumerate((3, 4)):
        outer.state[f"basis{i}"] = full.state[f"basis{i}"] = torch.linalg.qr(torch.randn(1, d, d).double()).Q
    outer.state["spectrum"] = full.state["spectrum"] = torch.rand(1, 3, 4, dtype=torch.float64)
    outer.closed_form(0.1)
    full.closed_form(0.1)
    assert_close(outer.operator(0.1, 0.1).diagonal(), full.operator(0.1, 0.1).diagonal())


def test_the_state_of_resnet50_takes_at_most_one_and_a_half_gibibytes():
    with torch.device("meta"):
        space = ParameterSpace.of(resnet50())
    made = FishLeg(space, FishLegSettings())
    numbers = sum(sum(block.factor_sizes) + 2 * block.size + sum(block.view.modes) for block in made._blocks)
    assert 4 * numbers <= 1.5 * 2**30
