"""Random small networks, losses and batch layouts against plain autograd, one example at a time, in float64.

The reference is torch's own loss of all examples in one batch: L, its gradient, and its second derivatives in each
example's outputs. Nothing of what is judged is used in it.
"""

import random
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from sparsekit import prune
from sparsekit.curvature import GaussNewton, gradient_rows
from sparsekit.errors import CurvatureError, DataError, ModelError
from sparsekit.methods.estimators import DiagonalFisher, DiagonalFisherSettings
from sparsekit.methods.interfaces import FinetuneSettings, measure
from sparsekit.problem.likelihoods import Bernoulli, Categorical, as_likelihood
from sparsekit.problem.objective import Objective
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.pruning.finetune import finetune
from sparsekit.reconstruction.fit import output_moments

CLASSES, INPUTS, WEIGHT = 3, 4, torch.tensor([0.3, 4.0, 1.0], dtype=torch.float64)

#: name -> (torch's loss, what targets are like)
LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss(), "labels"),
    "ignored": (nn.CrossEntropyLoss(), "ignored"),
    "another index ignored": (nn.CrossEntropyLoss(ignore_index=0), "labels"),
    "weighted": (nn.CrossEntropyLoss(weight=WEIGHT), "labels"),
    "weighted, ignored": (nn.CrossEntropyLoss(weight=WEIGHT), "ignored"),
    "a class without weight": (nn.CrossEntropyLoss(weight=WEIGHT * torch.tensor([0, 1, 1])), "labels"),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), "labels"),
    "smoothed, ignored": (nn.CrossEntropyLoss(label_smoothing=0.2), "ignored"),
    "smoothed, weighted": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2), "labels"),
    "smoothed, weighted, ignored": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2), "ignored"),
    "soft": (nn.CrossEntropyLoss(), "soft"),
    "soft, weighted": (nn.CrossEntropyLoss(weight=WEIGHT), "soft"),
    "soft, weighted, smoothed": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2), "soft"),
    "log-probabilities": (nn.NLLLoss(weight=WEIGHT), "ignored"),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), "ignored"),
    "sum, weighted": (nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"), "labels"),
    "binary": (nn.BCEWithLogitsLoss(), "bits"),
    "binary, weighted": (nn.BCEWithLogitsLoss(weight=WEIGHT[:, None], pos_weight=WEIGHT[:, None]), "bits"),
    "binary, soft, weighted": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT[:, None]), "fractions"),
    "binary, sum": (nn.BCEWithLogitsLoss(reduction="sum", pos_weight=WEIGHT[:, None]), "bits"),
    "squares": (nn.MSELoss(), "numbers"),
    "squares, sum": (nn.MSELoss(reduction="sum"), "numbers"),
}


class Network(nn.Module):
    """Inputs (N, 4, T) to outputs (N, 3, T), each position by itself or seeing its neighbours."""

    def __init__(self, mixing, log):
        super().__init__()
        self.first = nn.Conv1d(INPUTS, 3, 3, padding=1) if mixing else nn.Conv1d(INPUTS, 3, 1)
        self.second, self.log = nn.Conv1d(3, CLASSES, 1), log

    def forward(self, x):
        z = self.second(torch.tanh(self.first(x)))
        return z.log_softmax(1) if self.log else z


class Case:
    def __init__(self, name, seed):
        self.loss, kind = LOSSES[name]
        chance, draw = random.Random(f"{name} {seed}"), torch.Generator().manual_seed(seed)
        self.count, self.positions = (
            chance.randint(3, 7),
            chance.choice([1, 2] if name.startswith("binary") else [1, 2, 3]),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Network(chance.random() < 0.5, isinstance(self.loss, nn.NLLLoss)).double().eval()
        self.x = torch.randn(self.count, INPUTS, self.positions, generator=draw, dtype=torch.float64)
        self.y = self.targets(kind, draw)
        cuts = sorted(chance.sample(range(1, self.count), chance.randint(0, self.count - 1)))
        sizes = [b - a for a, b in zip([0, *cuts], [*cuts, self.count], strict=True)]
        self.batches = list(zip(self.x.split(sizes), self.y.split(sizes), strict=True))
        self.space = ParameterSpace.of(self.model, include=["*"])
        self.likelihood = as_likelihood(self.loss)
        self.objective = Objective(self.model, self.likelihood, self.batches, self.space)

    def targets(self, kind, draw):
        shape = (self.count, CLASSES, self.positions)
        if kind in ("labels", "ignored"):
            y = torch.randint(CLASSES, (self.count, self.positions), generator=draw)
            y[1, 0] = 1  # never all without weight
            if kind == "ignored":
                y[torch.rand(y.shape, generator=draw) < 0.4] = -100
                y[0], y[1, 0] = -100, 1  # one example ignored as a whole
            return y
        if kind == "soft":
            return torch.randn(shape, generator=draw, dtype=torch.float64).softmax(1)
        found = torch.rand(shape, generator=draw, dtype=torch.float64)
        return found.round() if kind == "bits" else found

    # -- the reference -----------------------------------------------------------------------------------
    def whole(self, z):
        """L as a function of the logits of all examples: torch's loss; of a sum, the mean over examples."""
        value = self.loss(z.log_softmax(1) if isinstance(self.loss, nn.NLLLoss) else z, self.y)
        return value / self.count if self.loss.reduction == "sum" else value

    def logits(self, n):
        """One example's, and their Jacobian (3T, n) by ordinary backward passes."""
        log, self.model.log = self.model.log, False
        z = self.model(self.x[n : n + 1])[0]
        self.model.log = log
        tensors = list(self.space.tensors(self.model).values())
        rows = [torch.autograd.grad(unit, tensors, retain_graph=True) for unit in z.flatten()]
        return z.detach(), torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])

    def hessian(self, Z, n):
        """∂²L in the logits of example n, (3T, 3T)."""

        def of_one(z):
            return self.whole(torch.cat([Z[:n], z.view(1, *Z.shape[1:]), Z[n + 1 :]]))

        return torch.autograd.functional.hessian(of_one, Z[n].flatten())

    def fishers(self):
        """The Gauss-Newton matrix of L; the empirical Fisher, in which a position of weight two counts as two."""
        found = [self.logits(n) for n in range(self.count)]
        Z, J = torch.stack([z for z, _ in found]), [j for _, j in found]
        leaf = Z.clone().requires_grad_(True)
        (G,) = torch.autograd.grad(self.whole(leaf), leaf)
        exact = empirical = 0
        for n in range(self.count):
            H = self.hessian(Z, n)
            exact = exact + J[n].T @ H @ J[n]
            row = self.empirical_vector(Z[n], G[n], H) @ J[n]
            empirical = empirical + torch.outer(row, row)
        return exact, empirical

    def empirical_vector(self, z, g, H):
        """g by position, over the root of its weight: its curvature beside that of the plain −log p."""
        if isinstance(self.loss, nn.MSELoss):
            plain = 2 * torch.ones_like(z)  # of (y − z)², noise of variance one half
        elif isinstance(self.loss, nn.BCEWithLogitsLoss):
            plain = z.sigmoid() * (1 - z.sigmoid())
        else:
            p = z.softmax(0)
            plain = (p * (1 - p)).sum(0)
        curvature = H.diagonal().view(z.shape)
        curvature = curvature.sum(0) if plain.dim() == 1 else curvature
        weight = (curvature / plain).expand_as(z)
        # a weight of nothing: rounding alone
        return torch.where(weight > 1e-12, g / weight.clamp_min(1e-12).sqrt(), 0.0).flatten()

    def accuracy(self):
        right = []
        if isinstance(self.loss, nn.MSELoss):
            return None
        with torch.no_grad():
            for x, y in zip(self.x, self.y, strict=True):
                z = self.model(x[None])[0]
                if isinstance(self.loss, nn.BCEWithLogitsLoss):
                    right += [(a > 0) == (b > 0.5) for a, b in zip(z.flatten(), y.flatten(), strict=True)]
                    continue
                labels = y.argmax(0) if y.is_floating_point() else y
                kept = [t for t in range(self.positions) if int(labels[t]) != self.loss.ignore_index]
                right += [int(z[:, t].argmax()) == int(labels[t]) for t in kept]
        return float(sum(map(float, right)) / len(right))


CASES = [pytest.param(name, seed, id=f"{name}-{seed}") for name in LOSSES for seed in range(3)]


def second_moment(objective, fisher, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat(list(gradient_rows(objective, fisher, generator=generator)))
    return rows.T @ rows / objective.count()


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_loss_gradient_and_accuracy_are_those_of_one_batch_in_torch(name, seed):
    case = Case(name, seed)
    log, case.model.log = case.model.log, False
    value = case.whole(case.model(case.x))
    case.model.log = log
    gradient = torch.autograd.grad(value, list(case.space.tensors(case.model).values()))
    assert_close(case.objective.loss(), float(value.detach()))
    assert_close(case.objective.gradient(), torch.cat([part.flatten() for part in gradient]))
    figures = measure(case.model, case.likelihood, case.batches)
    assert_close(figures["loss"], float(value.detach()))
    truth = case.accuracy()
    assert "accuracy" not in figures if truth is None else figures["accuracy"] == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_the_exact_fisher_and_products_are_the_gauss_newton_matrix_of_that_loss(name, seed):
    case = Case(name, seed)
    exact, _ = case.fishers()
    assert_close(second_moment(case.objective, "exact"), exact)
    v = torch.randn(case.space.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert_close(GaussNewton(case.objective) @ v, exact @ v)


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_the_empirical_fisher_counts_a_position_by_its_weight(name, seed):
    case = Case(name, seed)
    _, empirical = case.fishers()
    assert_close(second_moment(case.objective, "empirical"), empirical)


@pytest.mark.parametrize(
    ("name", "seed"), [case for case in CASES if not isinstance(LOSSES[case.values[0]][0], nn.MSELoss)]
)
def test_sampled_labels_give_the_gauss_newton_matrix_in_expectation(name, seed, monkeypatch):
    """Every label that can be drawn, by its probability: nothing is left to chance."""
    case = Case(name, seed)
    exact, _ = case.fishers()
    binary = isinstance(case.likelihood, Bernoulli)
    units = CLASSES * case.positions if binary else case.positions
    total = 0
    with torch.no_grad():
        z = case.model(case.x)
    for drawn in product(range(2 if binary else CLASSES), repeat=units):
        labels = torch.tensor(drawn).expand(case.count, -1)
        if binary:
            y = labels.reshape(z.shape).double()
            chance = torch.where(y > 0, z.sigmoid(), 1 - z.sigmoid()).flatten(1).prod(1)
            monkeypatch.setattr(Bernoulli, "sample", lambda self, f, g, y=y: y[: len(f)])
        else:
            chance = z.softmax(1).gather(1, labels[:, None])[:, 0].prod(1)
            monkeypatch.setattr(Categorical, "sample", lambda self, f, g, y=labels: y[: len(f)])
        rows = torch.cat(list(gradient_rows(case.objective, "sampled", generator=torch.Generator())))
        total = total + rows.T @ (chance[:, None] * rows)
    assert_close(total / case.count, exact)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("fisher", ["importance", "sampled"])
def test_drawn_rows_have_the_gauss_newton_matrix_as_second_moment(name, fisher):
    case = Case(name, 0)
    exact, _ = case.fishers()
    often = [(x.repeat_interleave(600, 0), y.repeat_interleave(600, 0)) for x, y in case.batches]  # the same L
    found = second_moment(Objective(case.model, case.likelihood, often, case.space), fisher)
    assert float((found - exact).norm() / exact.norm()) < 0.2  # ~ 1/√(600 N), and seeded


@pytest.mark.parametrize("name", [name for name, (_, kind) in LOSSES.items() if kind == "ignored"])
def test_padding_by_the_batch_changes_nothing(name):
    """Batches cut to their longest example, as a loader pads them, and the same in one padded batch."""
    case = Case(name, 1)
    case.model.first = nn.Conv1d(INPUTS, 3, 1).double()
    y = torch.full((4, 3), -100)
    y[0, 0], y[1, :2], y[2, :3], y[3, 0] = 1, torch.tensor([0, 2]), torch.tensor([1, 1, 0]), 2
    x = torch.randn(4, INPUTS, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    space = ParameterSpace.of(case.model)
    padded = Objective(case.model, case.likelihood, [(x, y)], space)
    cut = Objective(
        case.model, case.likelihood, [(x[:1, :, :1], y[:1, :1]), (x[1:3], y[1:3]), (x[3:, :, :2], y[3:, :2])], space
    )
    assert_close(cut.loss(), padded.loss())
    assert_close(cut.gradient(), padded.gradient())
    for fisher in ("exact", "empirical"):
        assert_close(second_moment(cut, fisher), second_moment(padded, fisher))
    assert measure(cut.model, cut.likelihood, cut.batches) == pytest.approx(
        measure(padded.model, padded.likelihood, padded.batches)
    )


def test_weightings_of_outputs_follow_the_weights_of_the_loss():
    case = Case("weighted, ignored", 1)
    exact, _ = case.fishers()
    moments = output_moments(case.objective, "exact", torch.Generator())
    for info in case.space.parameters:
        if len(info.shape) > 1:
            block = exact[info.slice, info.slice].view(info.shape[0], -1, info.shape[0], info.size // info.shape[0])
            assert_close(moments[info.name][0] / case.count, torch.einsum("oipi->op", block))


def test_without_weights_all_is_bitwise_a_plain_mean():
    z = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0))
    y = torch.randint(3, (5, 7), generator=torch.Generator().manual_seed(1))
    values = F.cross_entropy(z, y, reduction="none").mean(1)
    assert torch.equal(Categorical(ignore_index=255).losses(z, y), values)
    model, batches = nn.Conv1d(3, 3, 1), [(z[:2], y[:2]), (z[2:], y[2:])]
    objective = Objective(model, Categorical(), batches, ParameterSpace.of(model))
    assert [weight for _, _, weight in objective.weighted()] == [1.0, 1.0]
    assert Categorical().root_scale(z, y) == 7**-0.5
    assert measure(model, Categorical(), batches)["loss"] == objective.loss()


# -- as it is used -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["weighted, ignored", "smoothed, weighted", "soft, weighted", "binary, weighted"])
def test_fine_tuning_takes_torchs_steps(name):
    case = Case(name, 0)
    before = [p.detach().clone() for p in case.model.parameters()]
    gradients = torch.autograd.grad(case.loss(case.model(case.x), case.y), list(case.model.parameters()))
    recipe = FinetuneSettings(epochs=1, learning_rate=0.1, momentum=0, weight_decay=0)
    batches, mask = [(case.x, case.y)], Mask.full(case.space.size)
    finetune(case.model, case.likelihood, lambda: batches, case.space, mask, recipe, batches_per_epoch=1)
    for parameter, start, gradient in zip(case.model.parameters(), before, gradients, strict=True):
        assert_close(parameter.detach(), start - 0.1 * gradient)


def partly_ignored():
    """Three batches: one whole, one ignored as a whole, one by half."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 4, generator=draw), torch.randint(3, (24,), generator=draw)
    y[8:16], y[16:20] = 255, 255
    return list(zip(x.split(8), y.split(8), strict=True))


@pytest.mark.parametrize("estimator", ["diagonal", "obs", "fishleg"])
def test_pruning_reports_torchs_loss_of_the_targets_that_count(estimator):
    loss, data, model = nn.CrossEntropyLoss(ignore_index=255), partly_ignored(), nn.Linear(4, 3)
    given = {"name": estimator, "examples": 24, "batch_size": 8}
    pruned = prune(model, data, loss=loss, sparsity=0.5, estimator=given, compensation="exact")
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    with torch.no_grad():
        assert pruned.dense["loss"] == pytest.approx(float(loss(model(x), y)))
        assert pruned.steps[-1].pruned["loss"] == pytest.approx(float(loss(pruned.model(x), y)))
        right = (pruned.model(x).argmax(1) == y).sum() / (y != 255).sum()
    assert pruned.steps[-1].pruned["accuracy"] == pytest.approx(float(right))


def test_targets_that_are_all_ignored_are_refused():
    data = [(x, torch.full_like(y, 255)) for x, y in partly_ignored()]
    with pytest.raises(DataError, match="the targets of all 24 examples are ignored"):
        prune(nn.Linear(4, 3), data, loss=nn.CrossEntropyLoss(ignore_index=255), estimator="diagonal")


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss(), nn.HuberLoss()], ids=str)
def test_an_empirical_fisher_of_the_networks_own_outputs_is_refused(loss):
    model = nn.Linear(4, 3)
    with torch.no_grad():
        outputs = [(x, model(x)) for x, _ in partly_ignored()]
        data = [(x, z.softmax(1) if isinstance(loss, nn.CrossEntropyLoss) else z) for x, z in outputs]
    objective = Objective(model, as_likelihood(loss), data, ParameterSpace.of(model))
    with pytest.raises(CurvatureError, match="the network's own outputs up to rounding.*fisher='importance'"):
        next(gradient_rows(objective, "empirical"))


def test_labels_that_are_fitted_almost_exactly_are_no_rounding_errors():
    model, y = nn.Linear(3, 3, bias=False), torch.arange(3)
    model.weight.data = 12 * torch.eye(3)  # probabilities of 1 − 1e-5
    objective = Objective(model, Categorical(), [(torch.eye(3), y)], ParameterSpace.of(model))
    assert next(gradient_rows(objective, "empirical")).norm() > 0


class Centred(nn.Linear):
    """What an example gives depends on the others of its batch alone."""

    def forward(self, x):
        z = super().forward(x)
        return z - z.mean(0, keepdim=True)


def test_a_network_of_the_batch_is_not_said_to_have_no_gradients():
    model = Centred(4, 3)
    x, y = partly_ignored()[0]
    objective = Objective(model, Categorical(), [(x, y)], ParameterSpace.of(model))
    estimator = DiagonalFisher(objective.space, DiagonalFisherSettings())
    with pytest.raises(ModelError, match="depends on the other examples of its batch"):
        estimator.update(objective, generator=torch.Generator())


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_parts_of_an_objective_weigh_their_examples_as_the_whole_does(fisher):
    case = Case("weighted, ignored", 2)
    whole = torch.cat([rows for rows in gradient_rows(case.objective, fisher)])
    parts = [replace(case.objective, batches=[batch], share=case.objective.mean_share) for batch in case.batches]
    assert len(parts) > 1
    assert_close(torch.cat([rows for part in parts for rows in gradient_rows(part, fisher)]), whole)


def test_labels_as_bytes_are_the_classes_they_are():
    """As bytes, the ignored index -100 would be class 156."""
    draw = torch.Generator().manual_seed(0)
    outputs, labels = torch.randn(40, 171, dtype=torch.float64, generator=draw), torch.full((40,), 156)
    labels[::2] = 3
    categorical = Categorical()
    assert_close(categorical.losses(outputs, labels.to(torch.uint8)).mean(), F.cross_entropy(outputs, labels))
    assert categorical.counted(labels.to(torch.uint8)) == 40
