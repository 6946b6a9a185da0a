import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sparsekit import Bernoulli, Categorical, Gaussian
from sparsekit.errors import DataError, SettingsError
from sparsekit.likelihoods import Likelihood, LogProbabilities, Unspecified, as_likelihood

SHAPES = {"categorical": [(2, 4), (2, 3, 5)], "bernoulli": [(2, 4), (2, 2, 3)], "gaussian": [(2, 1), (2, 2, 3)]}
MADE = {"categorical": Categorical(), "bernoulli": Bernoulli(), "gaussian": Gaussian(variance=0.3)}
CASES = [pytest.param(MADE[name], shape, id=f"{name}-{shape}") for name, shapes in SHAPES.items() for shape in shapes]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets(likelihood, output):
    return likelihood.sample(output, torch.Generator().manual_seed(1))


def hessian(likelihood, output):
    """Oracle: ∂²(Σ_t −log p)/∂output² of each example, by automatic differentiation; (N, K, K)."""
    y = targets(likelihood, output)

    def loss(f, n):
        return likelihood.elementwise(f.view(1, *output.shape[1:]), y[n : n + 1]).sum()

    return torch.stack([torch.func.hessian(loss)(output[n].flatten(), n) for n in range(len(output))])


@pytest.mark.parametrize(("likelihood", "shape"), CASES)
def test_columns_square_to_the_losss_curvature(likelihood, shape):
    output = draw(*shape)
    columns = torch.stack([c.flatten(1) for c in likelihood.root_columns(output)], dim=-1)
    assert_close(columns @ columns.mT, hessian(likelihood, output))


@pytest.mark.parametrize(("likelihood", "shape"), CASES)
def test_products_with_the_curvature(likelihood, shape):
    output, v = draw(*shape), draw(*shape, seed=1)
    truth = (hessian(likelihood, output) @ v.flatten(1)[..., None]).view(shape)
    assert_close(likelihood.curvature(output, v), truth)
    assert_close(Likelihood.curvature(likelihood, output, v), truth)


@pytest.mark.parametrize("generic", [False, True], ids=["", "the base's own"])
@pytest.mark.parametrize(("likelihood", "shape"), CASES)
def test_drawn_roots_have_the_curvature_as_second_moment(likelihood, shape, generic):
    output, generator, draws = draw(*shape), torch.Generator().manual_seed(3), 8000
    many = output.repeat_interleave(draws, dim=0)
    roots = Likelihood.drawn_root(likelihood, many, generator) if generic else likelihood.drawn_root(many, generator)
    v = roots.flatten(1).view(shape[0], draws, -1)
    truth = hessian(likelihood, output)
    assert_close(v.mT @ v / draws, truth, atol=0.06 * float(truth.abs().max()), rtol=0)  # ~ 1/√8000


def test_a_categorical_root_has_one_length_whatever_is_drawn():
    output = draw(1, 5).repeat(50, 1)
    lengths = Categorical().drawn_root(output, torch.Generator().manual_seed(0)).square().sum(1)
    assert_close(lengths, hessian(Categorical(), output[:1])[0].trace().expand(50))


def test_a_draw_takes_the_memory_of_the_output():
    output = torch.zeros(2, 200, 64)  # 12,800 columns of 25,600 numbers each, were they stacked
    assert Categorical().drawn_root(output, torch.Generator()).shape == output.shape


@pytest.mark.parametrize(("likelihood", "shape"), CASES)
def test_sampled_scores_have_the_curvature_as_second_moment(likelihood, shape):
    output, draws = draw(*shape), 8000
    many = output.repeat_interleave(draws, dim=0).requires_grad_(True)
    score = likelihood.score(many, likelihood.sample(many, torch.Generator().manual_seed(2)))
    (v,) = torch.autograd.grad(score.sum(), many)
    v = v.flatten(1).view(shape[0], draws, -1)
    truth = hessian(likelihood, output) * likelihood.score_scale(likelihood.positions(output)) ** 2
    assert_close(v.mT @ v / draws, truth, atol=0.1 * float(truth.abs().max()), rtol=0)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian()], ids=lambda x: x.name)
def test_shapes_that_would_broadcast_are_refused(likelihood):
    with pytest.raises(DataError, match=r"\(4, 1\), the data \(4,\): reshape one of them"):
        likelihood.losses(torch.zeros(4, 1), torch.zeros(4))


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (nn.CrossEntropyLoss(), Categorical),
        (nn.functional.cross_entropy, Categorical),
        (nn.BCEWithLogitsLoss(), Bernoulli),
        (nn.MSELoss(), Gaussian),
        (nn.CrossEntropyLoss(label_smoothing=0.1), Categorical),
        (nn.CrossEntropyLoss(reduction="sum"), Categorical),
        (nn.NLLLoss(), LogProbabilities),
        (nn.L1Loss(), Unspecified),
        ("bernoulli", Bernoulli),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_torchs_losses_are_recognised(loss, kind):
    assert type(as_likelihood(loss)) is kind


def test_a_recognised_loss_is_the_same_number():
    output, target = draw(6, 3), draw(6, 3, seed=1)
    assert_close(as_likelihood(nn.MSELoss()).losses(output, target).mean(), nn.MSELoss()(output, target))


def test_any_other_loss_has_no_labels_to_sample():
    with pytest.raises(SettingsError, match="fisher='empirical'"):
        as_likelihood(nn.L1Loss()).sample(torch.zeros(2, 1), torch.Generator())


def test_an_unknown_name_is_refused():
    with pytest.raises(SettingsError, match="known by name: bernoulli, categorical, gaussian"):
        as_likelihood("crossentropy")
