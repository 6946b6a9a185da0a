from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sparsekit import Bernoulli, Categorical, Gaussian
from sparsekit.curvature import GaussNewton, gradient_rows
from sparsekit.errors import DataError, SettingsError
from sparsekit.methods.interfaces import measure
from sparsekit.problem.likelihoods import Likelihood, LogProbabilities, Unspecified, as_likelihood
from sparsekit.problem.objective import Objective
from sparsekit.problem.parameters import ParameterSpace

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


# -- what is refused, and what is not --------------------------------------------------------------------------
Z, LABELS = draw(4, 3), torch.tensor([0, 1, 2, 1])
BAD_TARGETS = [
    pytest.param(Z, torch.tensor([0, 255, 2, 1]), r"labels from 0 to 255, .* 3 classes .*ignore_index=255", id="255"),
    pytest.param(Z, torch.tensor([0, -1, 2, 1]), r"labels from -1 to 2, .*ignore_index=-1", id="negative"),
    pytest.param(Z, LABELS.float(), r"torch.float32.*give targets.long\(\)", id="float labels"),
    pytest.param(Z, LABELS[:, None], r"give targets.squeeze\(1\)", id="column"),
    pytest.param(Z, torch.eye(3)[LABELS].long(), r"targets.argmax\(1\)", id="one-hot"),
    pytest.param(Z, -Z.abs(), "probabilities are needed", id="negative soft labels"),
    pytest.param(draw(4, 5, 3), torch.zeros(4, 5).long(), r"logits.movedim\(-1, 1\)", id="channel last"),
    pytest.param(draw(4, 3, 5), torch.zeros(4, 6).long(), r"labels of shape \(4, 5\)", id="positions"),
    pytest.param(draw(4), LABELS, "loss='bernoulli'", id="one logit"),
]


@pytest.mark.parametrize(("output", "target", "message"), BAD_TARGETS)
def test_targets_that_are_no_labels_are_refused(output, target, message):
    with pytest.raises(DataError, match=message):
        Categorical().losses(output, target)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_may_be_any_integers(dtype):
    assert_close(Categorical().losses(Z, LABELS.to(dtype)), Categorical().losses(Z, LABELS))


def test_targets_of_units_lie_between_zero_and_one():
    with pytest.raises(DataError, match="the data has 0 to 255: rescale them"):
        Bernoulli().losses(Z, torch.tensor([[0.0, 255.0, 0.0]] * 4))


BAD_LOSSES = [
    (nn.CrossEntropyLoss(reduction="none"), "give reduction='mean' or 'sum'"),
    (partial(nn.functional.mse_loss, reduction="none"), "give reduction='mean' or 'sum'"),
    (partial(nn.functional.cross_entropy, size_average=False), "CrossEntropyLoss with size_average is not known"),
    (nn.CrossEntropyLoss(weight=torch.tensor([1.0, -1.0, 1.0])), "none negative"),
    (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(-1.0)), "none negative"),
    (nn.CrossEntropyLoss(label_smoothing=-0.1), "between 0 and 1"),
    (nn.CrossEntropyLoss, "a name, a Likelihood or what is called"),
    (None, "a name, a Likelihood or what is called"),
]


@pytest.mark.parametrize(("loss", "message"), BAD_LOSSES)
def test_a_loss_that_leaves_open_what_it_is_is_refused(loss, message):
    with pytest.raises(SettingsError, match=message):
        as_likelihood(loss)


def test_class_weights_are_as_many_as_classes():
    with pytest.raises(SettingsError, match="2 class weights, the model gives 3 classes"):
        Categorical(weight=[1.0, 2.0]).losses(Z, torch.tensor([0, 1, 0, 1]))


def test_weights_by_example_are_refused():
    with pytest.raises(SettingsError, match="examples have no weights of their own"):
        Bernoulli(weight=torch.ones(4, 1)).losses(Z, Z.sigmoid())


@pytest.mark.parametrize(
    "loss",
    [
        partial(nn.functional.cross_entropy, weight=torch.tensor([1.0, 2.0, 3.0]), ignore_index=1),
        partial(nn.functional.cross_entropy, label_smoothing=0.3),
        partial(nn.functional.mse_loss),
        partial(nn.functional.binary_cross_entropy_with_logits, pos_weight=torch.tensor(2.0)),
    ],
    ids=["weighted", "smoothed", "squares", "binary"],
)
def test_partial_functions_are_the_same_number(loss):
    target = LABELS if loss.func is nn.functional.cross_entropy else Z.sigmoid()
    plain = partial(loss.func, **{k: v.double() if torch.is_tensor(v) else v for k, v in loss.keywords.items()})
    assert_close(as_likelihood(loss).losses(Z, target).mean(), plain(Z, target))


def test_likelihoods_with_weights_can_be_compared():
    assert Categorical(weight=torch.ones(3)) == Categorical(weight=[1, 1, 1]) != Categorical()
    assert hash(Bernoulli(pos_weight=torch.ones(2, 1))) == hash(Bernoulli(pos_weight=((1.0,), (1.0,))))


def test_outputs_that_are_no_log_probabilities_are_refused():
    with pytest.raises(DataError, match="log_softmax, or give CrossEntropyLoss"):
        as_likelihood(nn.NLLLoss()).losses(Z, LABELS)


def test_a_batch_that_is_ignored_whole_has_no_loss_and_no_gradient():
    z = Z.clone().requires_grad_(True)
    losses = Categorical().losses(z, torch.full((4,), -100))
    assert losses.tolist() == [0, 0, 0, 0]
    assert torch.autograd.grad(losses.sum(), z)[0].abs().sum() == 0


def test_any_loss_that_is_normalised_over_the_batch_is_refused():
    def loss(z, y):
        return nn.functional.cross_entropy(z, y, weight=torch.tensor([1.0, 9.0, 1.0], dtype=z.dtype))

    with pytest.raises(DataError, match="it is normalised over the batch"):
        as_likelihood(loss).losses(Z, LABELS)


def test_any_loss_that_joins_examples_is_refused_though_it_gives_a_number_for_each():
    with pytest.raises(DataError, match="or joins examples"):
        as_likelihood(lambda z, y: (z - z.mean(0) - y).square().sum(1)).losses(Z, draw(4, 3, seed=1))


def test_any_loss_that_ignores_an_example_is_refused_and_not_said_to_be_nan():
    with pytest.raises(DataError, match="it is normalised over the batch"):
        as_likelihood(lambda z, y: nn.functional.cross_entropy(z, y)).losses(Z, LABELS.where(LABELS > 0, -100))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_any_loss_may_be_a_mean_a_sum_or_a_number_for_each_example(reduction):
    def loss(z, y):
        values = (z - y).abs().sum(1)
        return {"mean": values.mean(), "sum": values.sum(), "none": values}[reduction]

    assert_close(as_likelihood(loss).losses(Z, Z + 1), torch.full((4,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.L1Loss(reduction="none"), r"a tensor of \(1, 3\) for one example"),
        (nn.TripletMarginLoss(), "fails on the outputs .* of one example"),
        (lambda z, y: 0.0, "type float for one example"),
    ],
)
def test_any_loss_gives_one_number_for_an_example(loss, message):
    with pytest.raises(DataError, match=message):
        as_likelihood(loss).losses(Z, Z)


class Poisson(Likelihood):
    """Another's likelihood, that knows the abstract methods alone."""

    name, reduction = "poisson", "mean"

    def elementwise(self, output, target):
        return output.exp() - target * output

    def sample(self, output, generator):
        return torch.poisson(output.exp(), generator=generator)

    def root_columns(self, output):
        for t in range(output.shape[1]):
            yield (output / 2).exp() * torch.eye(output.shape[1], dtype=output.dtype)[t]

    def positions(self, output):
        return output.shape[1]


@pytest.mark.parametrize("fisher", ["importance", "sampled", "exact", "empirical"])
def test_a_likelihood_of_the_abstract_methods_alone_will_do(fisher):
    model = nn.Linear(3, 3).double()
    objective = Objective(model, Poisson(), [(Z, Z.exp()), (Z[:1], Z[:1].exp())], ParameterSpace.of(model))
    rows = torch.cat(list(gradient_rows(objective, fisher, generator=torch.Generator().manual_seed(0))))
    assert rows.isfinite().all()
    assert measure(model, Poisson(), objective.batches) == {"loss": objective.loss()}
    F = torch.stack([GaussNewton(objective) @ e for e in torch.eye(9, dtype=torch.float64)])
    if fisher == "exact":
        assert_close(rows.T @ rows / 5, F)
