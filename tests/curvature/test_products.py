import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sparsekit.curvature import GaussNewton
from sparsekit.curvature.attention import plain_attention
from sparsekit.problem.likelihoods import Categorical
from sparsekit.problem.objective import Objective
from sparsekit.problem.parameters import ParameterSpace
from sparsekit.testing.oracles import dense_fisher


class Attentive(nn.Module):
    """Encoder layers as torch builds them, by default on their fast path and on fused kernels."""

    def __init__(self, norm_first):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.encoder(self.embedding(x)).mean(1))


def attentive(norm_first=False):
    torch.manual_seed(0)
    model = Attentive(norm_first).double().eval()
    batches = [(torch.randint(5, (count, 3)), torch.randint(3, (count,))) for count in (4, 1)]
    return Objective(model, Categorical(), batches, ParameterSpace.of(model))


@pytest.mark.parametrize("norm_first", [False, True])
def test_products_through_attention(norm_first):
    objective = attentive(norm_first)
    V = torch.randn(objective.space.size, 2, dtype=torch.float64)
    with plain_attention():  # for the oracle: torch warns where it has to do without a batching rule
        expected = dense_fisher(objective, "exact") @ V
    assert_close(GaussNewton(objective) @ V, expected)


def test_attention_is_left_as_it_was_set():
    objective = attentive()
    GaussNewton(objective) @ torch.ones(objective.space.size, dtype=torch.float64)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
