"""Each check must see what it is for: estimators that are wrong on purpose, each in one way."""

from collections import Counter

import pytest
import torch

from sparsekit.curvature import gradient_rows
from sparsekit.errors import CurvatureError
from sparsekit.linalg import BlockDiagonal, Diagonal, LinearOperator
from sparsekit.methods.interfaces import CurvatureEstimator, EstimatorSettings
from sparsekit.problem.objective import as_found
from sparsekit.removal import InverseFisher, Removal
from sparsekit.testing import (
    CHECKS,
    PROBLEMS,
    Case,
    damped,
    dense_fisher,
    dense_rows,
    estimator_checks,
)
from sparsekit.testing.case import cuts


class DenseSettings(EstimatorSettings):
    decay: float = 0.5


class Dense(CurvatureEstimator):
    """The whole Fisher: right in every way."""

    name = "dense"
    Settings = DenseSettings
    operator = BlockDiagonal

    def __init__(self, space, settings):
        super().__init__(space, settings)
        self.fisher = None

    def rows(self, objective, generator):
        return torch.cat(list(gradient_rows(objective, self.settings.fisher, generator=generator)))

    def mean(self, objective, rows):
        return (rows.mT @ rows).double() / objective.count()

    def update(self, objective, *, generator):
        new = self.mean(objective, self.rows(objective, generator))
        decay = 0.0 if self.fisher is None else self.settings.decay
        self.fisher = new if self.fisher is None else decay * self.fisher + (1 - decay) * new
        return {"trace": float(new.trace())}

    def gamma(self, damping):
        return self.resolve_damping(damping, float(self.fisher.diagonal().mean()))

    def inverse(self, damping=None):
        if self.fisher is None:
            raise CurvatureError("call update first")
        gamma = self.gamma(damping)
        return InverseFisher(
            self.operator((self.fisher + gamma * torch.eye(self.space.size))[None], [self.space.size]), gamma
        )

    def state_dict(self):
        return {} if self.fisher is None else {"fisher": self.fisher}

    def load_state_dict(self, state):
        self.fisher = state.get("fisher")

    @classmethod
    def memory(cls, space, settings):
        return 5 * 8 * space.size**2


def whole(objective, settings):
    return damped(dense_fisher(objective, settings.fisher), settings)


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(run, id=f"{fisher}-{name}")
        for fisher in ("exact", "empirical")
        for name, run in estimator_checks(Dense, {"fisher": fisher}, ("linear", "tied", "gaussian"), expected=whole)
    ],
)
def test_a_right_estimator_passes(check):
    check()


# -- wrong operators -----------------------------------------------------------------------------------------
class NotSymmetric(Dense):
    class operator(BlockDiagonal):
        def _matmul(self, X):
            return super()._matmul(X) + 0.01 * X.roll(1, dims=0)


class NotPositive(Dense):
    class operator(BlockDiagonal):
        def _matmul(self, X):
            return super()._matmul(X) - 20 * X


class NotLinear(Dense):
    class operator(BlockDiagonal):
        def _matmul(self, X):
            return super()._matmul(X / X.norm())


class WrongSolve(Dense):
    class operator(BlockDiagonal):
        def _solve(self, B):
            return super()._solve(B) - 0.01 * B  # damping forgotten


class WrongDiagonal(Dense):
    class operator(BlockDiagonal):
        def diagonal(self):
            return 1 / self.inverse_diagonal()


class NegativeDiagonal(Dense):
    class operator(BlockDiagonal):
        def diagonal(self):
            return super().diagonal().where(torch.arange(self.size) != 3, -1e-3)


class WrongInverseDiagonal(Dense):
    class operator(BlockDiagonal):
        def inverse_diagonal(self):
            return 1 / self.diagonal()


class Half(Dense):
    def mean(self, objective, rows):
        return super().mean(objective, rows) / 2


class CouplesNothing(Dense):
    class operator(BlockDiagonal):
        def minimise(self, fixed, values, linear=None, **_):
            return Diagonal(self.diagonal()).minimise(fixed, values, linear)


class ForgetsTheGradient(Dense):
    class operator(BlockDiagonal):
        def minimise(self, fixed, values, linear=None, **_):
            return super().minimise(fixed, values)


class IgnoresTheMask(Dense):
    def inverse(self, damping=None):
        found = super().inverse(damping)
        found.diagonal = lambda mask=None: found.operator.diagonal()
        return found


class ConditionsTwice(Dense):
    """Takes the removed weights' part away again, as if they removed more than they do."""

    class operator(BlockDiagonal):
        def conditioned(self, kept):
            right = super().conditioned(kept)
            return BlockDiagonal(1.5 * right.precision, right.stretches())


class BringsBack(Dense):
    """Moves every weight, those that are removed too."""

    def inverse(self, damping=None):
        found = super().inverse(damping)
        found.remove = lambda weights, mask, chosen: Removal(found @ torch.where(chosen, -weights, 0.0), 1.0)
        return found


# -- wrong conduct -------------------------------------------------------------------------------------------
class GuessesBeforeUpdate(Dense):
    def inverse(self, damping=None):
        if self.fisher is None:
            self.fisher = torch.zeros(self.space.size, self.space.size)
        return super().inverse(damping or 1.0)


class SwallowsNaN(Dense):
    def rows(self, objective, generator):
        return dense_rows(objective, "empirical").nan_to_num()


class ReturnsNaN(Dense):
    def update(self, objective, *, generator):
        return super().update(objective, generator=generator) | {"residual": float("nan")}


class Understates(Dense):
    @classmethod
    def memory(cls, space, settings):
        return 4 * space.size


class DrawsGlobally(Dense):
    def rows(self, objective, generator):
        rows = super().rows(objective, generator)
        return rows * (1 + 1e-9 * torch.rand(len(rows), 1, dtype=rows.dtype))


class ForgetsState(Dense):
    def state_dict(self):
        return {}


class ForgetsHistory(Dense):
    """Mixes by the number of updates, which it does not store."""

    updates = 0

    def update(self, objective, *, generator):
        new = self.mean(objective, self.rows(objective, generator))
        self.fisher = new if self.fisher is None else (self.updates * self.fisher + new) / (self.updates + 1)
        self.updates += 1
        return {}


class CompactsAtShrink(Dense):
    def shrink(self, mask):
        if self.fisher is not None:
            self.fisher = self.fisher * mask.kept * mask.kept[:, None]


class BakesDamping(Dense):
    def update(self, objective, *, generator):
        figures = super().update(objective, generator=generator)
        self.baked = super().gamma(None)
        return figures

    def gamma(self, damping):
        return self.baked


class BakesDampingIn(Dense):
    def mean(self, objective, rows):
        return super().mean(objective, rows) + self.settings.damping * torch.eye(self.space.size)


class KeepsDamping(Dense):
    def inverse(self, damping=None):
        found = super().inverse(damping)
        self.settings = self.settings.model_copy(update={"damping": found.damping, "damping_scale": "absolute"})
        return found


class DividesByANorm(Dense):
    class operator(BlockDiagonal):
        def _matmul(self, X):
            return super()._matmul(X) / X.shape[0] ** 0.5


class LosesTheCurvature(Dense):
    """As where entries of the precision underflow to zero: no cut costs anything."""

    def inverse(self, damping=None):
        gamma = super().inverse(damping).damping
        operator = DenseInverse(torch.eye(self.space.size) / gamma)
        operator._solve = torch.zeros_like
        return InverseFisher(operator, gamma)


class DenseInverse(LinearOperator):
    """Σ as given, whatever it is."""

    def __init__(self, sigma):
        super().__init__(len(sigma), sigma.dtype, sigma.device)
        self.sigma = sigma

    def _matmul(self, X):
        return self.sigma @ X

    def _solve(self, B):
        return torch.linalg.solve(self.sigma, B)

    def diagonal(self):
        return self.sigma.diagonal()

    def inverse_diagonal(self):
        return self.sigma.inverse().diagonal()


class AveragesBatches(Dense):
    """Rows are mean gradients of batches, as published for WoodFisher: smaller by the batch size."""

    def rows(self, objective, generator):
        return torch.stack([r.mean(0) for r in gradient_rows(objective, self.settings.fisher, generator=generator)])


class DividesByTheAsked(Dense):
    """By the number of examples in the settings instead of those that came."""

    def mean(self, objective, rows):
        return rows.mT @ rows / self.settings.examples


class OneRowTooFew(Dense):
    def rows(self, objective, generator):
        return super().rows(objective, generator)[:-1]


class CountsWholeBatches(Dense):
    """The last, short batch counts as a whole one."""

    def mean(self, objective, rows):
        sizes = [len(targets) for _, targets in objective.batches]
        return rows.mT @ rows / (len(sizes) * max(sizes))


class TakesZeroForRemoved(Dense):
    def mean(self, objective, rows):
        return super().mean(objective, rows * (objective.space.read(objective.model) != 0))


class InTrainingMode(Dense):
    def rows(self, objective, generator):
        if objective.model.training:
            with torch.no_grad():
                return super().rows(objective, generator) * float(objective.model(objective.batches[0][0]).norm())
        return super().rows(objective, generator)


class MovesTheModel(Dense):
    """A step out and back in place, which rounding does not undo."""

    def rows(self, objective, generator):
        with torch.no_grad():
            for parameter in objective.space.tensors(objective.model).values():
                parameter.add_(0.1).sub_(0.1)
        return super().rows(objective, generator)


class MovesTheStatistics(Dense):
    def rows(self, objective, generator):
        modes = {module: module.training for module in objective.model.modules()}
        objective.model.train()
        with torch.no_grad():
            objective.model(objective.batches[0][0])
        for module, mode in modes.items():
            module.training = mode
        return super().rows(objective, generator)


class LeavesHooks(Dense):
    def rows(self, objective, generator):
        objective.model.register_forward_hook(lambda *_: None)
        return super().rows(objective, generator)


class LeavesGradients(Dense):
    def rows(self, objective, generator):
        with as_found(objective.model):
            inputs, targets = objective.batches[0]
            objective.likelihood.losses(objective.model(inputs), targets).sum().backward()
        return super().rows(objective, generator)


class Unfreezes(Dense):
    def rows(self, objective, generator):
        objective.model.requires_grad_(True)
        return super().rows(objective, generator)


WRONG = [
    (NotSymmetric, "symmetry", "Σ is not symmetric: .* off by"),
    (NotPositive, "positive_definiteness", "its eigenvalues go from -"),
    (NotLinear, "products", r"Σ X for X \(40,\)"),
    (WrongSolve, "precision", "H X"),
    (WrongSolve, "removal_without_compensation", "the increase is given as"),
    (WrongDiagonal, "diagonal", "diag Σ: .* off by"),
    (WrongDiagonal, "independent_removal", "of ‖δ"),
    (NegativeDiagonal, "diagonal", "1 of 40 entries, the least -1.000e-03"),
    (WrongInverseDiagonal, "inverse_diagonal", "diag H"),
    (Half, "expected", "Σ from all examples against the expected"),
    (Half, "joint_removal", "joint removal, the first cut, against the expected H"),
    (CouplesNothing, "joint_removal", "joint removal, the first cut, against its own dense H"),
    (ForgetsTheGradient, "joint_removal_with_gradient", "joint removal"),
    (CouplesNothing, "joint_is_never_worse", "the predicted increase of joint removal is"),
    (IgnoresTheMask, "masked_diagonal", "on a weight that was removed before the second cut"),
    (ConditionsTwice, "conditioned", r"below \(H_SS\)⁻¹"),
    (
        BringsBack,
        "removed_stays_removed",
        "at sparsity 0.3, 12 weights of 40 are to be zero: 12 are removed, 0 are zero",
    ),
    (BringsBack, "semi_structured_removal", "4 of a group of 4 weights of 'first.weight' stay"),
    (GuessesBeforeUpdate, "update_comes_first", "a CurvatureError is needed"),
    (SwallowsNaN, "not_a_number", "NaN in the first batch"),
    (ReturnsNaN, "figures", "residual = nan"),
    (Understates, "memory", r"memory\(\) says 160 bytes; the state alone takes 12800"),
    (DrawsGlobally, "determinism", "fisher differs by up to"),
    (DrawsGlobally, "model_is_left_as_found", "the state of torch's global generator differs"),
    (ForgetsState, "state_round_trip", "CurvatureError|call update"),
    (ForgetsHistory, "resume", "after resuming .* differs by up to"),
    (CompactsAtShrink, "shrink", "back to the full one"),
    (BakesDamping, "another_damping", "the damping .* was asked for"),
    (KeepsDamping, "damping_is_not_kept", "Σ differs by up to"),
    (BakesDampingIn, "adopt", "Σ from another's statistics"),
    (DividesByANorm, "large_damping", "γΣ at γ"),
    (LosesTheCurvature, "small_damping", "in float32"),
    (AveragesBatches, "order_of_examples", "Σ from one batch"),
    (CountsWholeBatches, "order_of_examples", "Σ from one batch"),
    (DividesByTheAsked, "mean_over_examples", "every example twice"),
    (OneRowTooFew, "mean_over_examples", "twice"),
    (TakesZeroForRemoved, "zero_weights", "Σ where weights are 0"),
    (MovesTheModel, "model_is_left_as_found", "parameter 'first.weight' differs by up to"),
    (LeavesHooks, "model_is_left_as_found", "the register of hooks of '' differs"),
    (LeavesGradients, "model_is_left_as_found", "the gradient of 'head.bias'"),
    (Unfreezes, "model_is_left_as_found", "requires_grad of 'first.weight' differs"),
]


def test_negative_costs_are_refused_by_the_removal():
    """A rank-one recursion in float32 can give such an operator; where it does depends on the processor."""
    case = Case(Dense, "tied", {"fisher": "exact"})
    *_, cut = cuts(case.objective())
    along = torch.where(cut.chosen, cut.weights, 0.0)
    along = along / along.norm()
    inverse = InverseFisher(DenseInverse(torch.eye(len(along), dtype=along.dtype) - 2 * along.outer(along)), 1e-8)
    with pytest.raises(CurvatureError, match="which is negative: the inverse Fisher .* is not positive definite"):
        inverse.remove(cut.weights, cut.mask, cut.chosen, "none")


@pytest.mark.parametrize(("wrong", "check", "message"), WRONG, ids=lambda x: getattr(x, "__name__", None))
def test_a_wrong_estimator_fails(wrong, check, message):
    case = Case(wrong, "tied", {"fisher": "exact"}, expected=whole)
    with pytest.raises((AssertionError, CurvatureError), match=message):
        CHECKS[check](case)


@pytest.mark.parametrize(
    ("wrong", "check", "message"),
    [
        (InTrainingMode, "evaluation_mode", "from a model in training mode"),
        (MovesTheStatistics, "model_is_left_as_found", "buffer '1.running_mean' differs by up to"),
    ],
)
def test_a_wrong_estimator_fails_where_there_is_batch_normalisation(wrong, check, message):
    with pytest.raises(AssertionError, match=message):
        CHECKS[check](Case(wrong, "convolution", {"fisher": "exact"}))


def test_every_check_meets_every_problem():
    names = Counter(name for name, _ in estimator_checks(Dense, expected=whole))
    assert set(names) == {f"{check}-{name}" for check in CHECKS for name in PROBLEMS}
    assert set(names.values()) == {1}


def test_an_approximation_is_not_compared_with_an_expected_precision():
    names = {name for name, _ in estimator_checks(Dense, problems=["mlp"])}
    assert names == {f"{check}-mlp" for check in CHECKS if check != "expected"}


def test_a_waived_check_is_left_out():
    names = {name for name, _ in estimator_checks(Dense, problems=["mlp"], waived={"resume": "keeps nothing"})}
    assert "resume-mlp" not in names and "shrink-mlp" in names


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"waived": {"resum": "a reason"}}, "no check 'resum'; did you mean 'resume'"),
        ({"problems": ["mpl"]}, "no problem 'mpl'; did you mean 'mlp'"),
    ],
)
def test_unknown_names_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        estimator_checks(Dense, **wrong)


def test_every_check_has_an_estimator_that_fails_it():
    seen = {check for _, check, _ in WRONG} | {"evaluation_mode"}
    assert seen == {name for name, check in CHECKS.items() if not check.__module__.endswith("fisher_checks")}
