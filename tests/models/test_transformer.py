import torch
from torch.testing import assert_close

from sparsekit.models import SequenceClassifier
from sparsekit.problem.parameters import ParameterSpace


def small():
    torch.manual_seed(0)
    return SequenceClassifier(5, 6, 3, width=8, heads=2, layers=2).double().eval()


def test_embeddings_and_attention_are_prunable_and_norms_are_not():
    assert ParameterSpace.of(small()).names == (
        "tokens.weight",
        "positions.weight",
        *(
            f"layers.{k}.{name}.weight".replace("in_proj.weight", "in_proj_weight")
            for k in range(2)
            for name in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
        ),
        "linear.weight",
    )


def test_order_of_the_tokens_matters():
    x = torch.tensor([[0, 1, 2, 3, 4, 0], [4, 1, 2, 3, 0, 0]])
    first, second = small()(x)
    assert not torch.allclose(first, second)


def test_examples_do_not_see_one_another():
    x = torch.randint(5, (3, 6), generator=torch.Generator().manual_seed(0))
    model = small()
    assert_close(model(x), torch.cat([model(x[i : i + 1]) for i in range(3)]))
