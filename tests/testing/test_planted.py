"""A green kit means a right estimate: right estimators pass every check, each planted defect fails the one meant."""

import copy
import re
from dataclasses import replace

import pytest
import torch

from sparsekit import CurvatureError, CurvatureEstimator, InverseFisher
from sparsekit.curvature import fisher_diagonal, gradient_rows, kronecker_factors
from sparsekit.linalg import BlockDiagonal, Diagonal, DirectSum, KroneckerDiagonal
from sparsekit.methods.estimators import DiagonalFisher
from sparsekit.testing import CHECKS, PROBLEMS, Case, estimator_checks

EXACT = {"trace": (1 - 1e-6, 1 + 1e-6), "correlation": 0.999}


class Dense(CurvatureEstimator):
    """F of the whole space as a matrix; methods are small so that each can be made wrong by itself."""

    name = "dense"

    def __init__(self, space, settings):
        super().__init__(space, settings)
        self.F = None

    def kind(self):
        return self.settings.fisher

    def rows(self, objective, generator):
        found = gradient_rows(objective, self.kind(), generator=generator)
        return torch.cat([self.flat(batch) for batch in found])

    def flat(self, rows):
        return rows if isinstance(rows, torch.Tensor) else torch.cat([rows[n].flatten(1) for n in self.space.names], 1)

    def matrix(self, objective, generator):
        G = self.rows(objective, generator)
        return G.mT @ G / objective.count()

    def assimilate(self, new):
        self.F = new

    def update(self, objective, *, generator):
        F = self.matrix(objective, generator)
        if not bool(F.isfinite().all()):
            raise CurvatureError("a gradient is not finite")
        self.assimilate(F)
        return {"mean_diagonal": float(self.F.diagonal().mean())}

    def mean(self):
        return float(self.F.diagonal().double().mean())

    def damping(self, given):
        return self.resolve_damping(given, self.mean())

    def precision(self, gamma):
        return self.F + gamma * torch.eye(len(self.F)).to(self.F)

    def inverse(self, damping=None):
        if self.F is None:
            raise CurvatureError("the estimator has seen no examples; call update first")
        gamma = self.damping(damping)
        return InverseFisher(BlockDiagonal.of_precision(self.precision(gamma)[None], [self.space.size]), gamma)

    def state_dict(self):
        return {} if self.F is None else {"F": self.F}

    def load_state_dict(self, state):
        self.F = state.get("F")

    @classmethod
    def memory(cls, space, settings):
        return 32 * space.size**2


class KroneckerFactored(CurvatureEstimator):
    """K-FAC from `kronecker_factors`: outputs ⊗ inputs, damped exactly in its eigenbasis; a diagonal for the rest."""

    name = "k-fac"

    def __init__(self, space, settings):
        super().__init__(space, settings)
        self.state = {}

    def factors(self, objective, generator):
        return kronecker_factors(objective, self.settings.fisher, generator=generator)

    def update(self, objective, *, generator):
        labels = generator.get_state()
        self.state = {}
        for name, (inputs, outputs) in self.factors(objective, generator).items():
            self.state |= {f"{name}.inputs": inputs, f"{name}.outputs": outputs}
        generator.set_state(labels)
        diagonal = fisher_diagonal(objective, self.settings.fisher, generator=generator).double()
        self.state |= {
            f"{i.name}.diagonal": diagonal[i.slice]
            for i in self.space.parameters
            if f"{i.name}.inputs" not in self.state
        }
        if not all(bool(tensor.isfinite().all()) for tensor in self.state.values()):
            raise CurvatureError("a gradient is not finite")
        return {"mean_diagonal": self.mean()}

    def mean(self):
        total = 0.0
        for info in self.space.parameters:
            if f"{info.name}.diagonal" in self.state:
                total += float(self.state[f"{info.name}.diagonal"].sum())
            else:
                A, B = self.state[f"{info.name}.inputs"], self.state[f"{info.name}.outputs"]
                total += float((A.diagonal(dim1=1, dim2=2).sum(1) * B.diagonal(dim1=1, dim2=2).sum(1)).sum())
        return total / self.space.size

    def inverse(self, damping=None):
        if not self.state:
            raise CurvatureError("the estimator has seen no examples; call update first")
        gamma, parts = self.resolve_damping(damping, self.mean()), []
        for info in self.space.parameters:
            if f"{info.name}.diagonal" in self.state:
                parts.append(Diagonal((self.state[f"{info.name}.diagonal"] + gamma).reciprocal()))
                continue
            (b, U), (a, V) = (torch.linalg.eigh(self.state[f"{info.name}.{k}"]) for k in ("outputs", "inputs"))
            q = (b.clamp_min(0)[:, :, None] * a.clamp_min(0)[:, None] + gamma).reciprocal()
            parts.append(KroneckerDiagonal([U, V], q, orthogonal=True))
        return InverseFisher(DirectSum(parts), gamma)

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        self.state = dict(state)

    @classmethod
    def memory(cls, space, settings):
        return 64 * sum(info.size + info.shape[0] ** 2 + (info.size // info.shape[0]) ** 2 for info in space.parameters)


# K-FAC's trace is E|a|² E|d|² where the Fisher's is E|a|²|d|²; of few examples they are not the same.
RIGHT = {
    "dense": estimator_checks(Dense, **EXACT, solve_tolerance=1e-6),
    "diagonal": estimator_checks(DiagonalFisher, **EXACT),
    "k-fac": estimator_checks(KroneckerFactored, trace=(0.5, 2.0), correlation=0.7, tolerance=1e-6),
}


@pytest.mark.parametrize(
    "check", [pytest.param(run, id=f"{label}-{name}") for label, checks in RIGHT.items() for name, run in checks]
)
def test_right_estimators_pass(check):
    check()


# -- defects -----------------------------------------------------------------------------------------------
def of(base, **methods):
    return type("Defective", (base,), methods)


def positions(objective):
    inputs, _ = objective.batches[0]
    return objective.likelihood.positions(objective.model(inputs))


def first_use_alone(self, objective, generator):
    """Gradients with the second use of a tied weight a copy of its own."""
    model = objective.model
    if not hasattr(model, "second") or getattr(model.second, "weight", None) is not model.first.weight:
        return Dense.matrix(self, objective, generator)
    model = copy.deepcopy(model)
    model.second.weight = torch.nn.Parameter(model.first.weight.detach().clone())
    return Dense.matrix(
        self, type(objective)(model, objective.likelihood, objective.batches, objective.space), generator
    )


def sorted_order(self, objective, generator):
    F, sizes = Dense.matrix(self, objective, generator), {i.name: i.slice for i in self.space.parameters}
    order = torch.cat([torch.arange(s.start, s.stop) for _, s in sorted(sizes.items())])
    return F[order[:, None], order]


def scaled(factor):
    return lambda self, o, g: factor(self, o) * Dense.matrix(self, o, g)


def swapped(self, objective, generator):
    found = kronecker_factors(objective, self.settings.fisher, generator=generator)
    return {name: type(f)(f.outputs, f.inputs) if f.inputs.shape == f.outputs.shape else f for name, f in found.items()}


def of_batches(self, objective, generator):
    G = torch.stack([self.flat(batch).mean(0) for batch in gradient_rows(objective, self.kind(), generator=generator)])
    return G.mT @ G / len(G)


def mean_of_batch_means(self, objective, generator):
    parts = [self.flat(batch) for batch in gradient_rows(objective, self.kind(), generator=generator)]
    return torch.stack([G.mT @ G / len(G) for G in parts]).mean(0)


def without_the_last_batch(self, objective, generator):
    fewer = type(objective)(
        objective.model, objective.likelihood, objective.batches[:-1] or objective.batches, self.space
    )
    return Dense.matrix(self, fewer, generator)


def running_average(self, new):
    self.F = 0.5 * new if self.F is None else 0.5 * self.F + 0.5 * new


def running_sum(self, new):
    self.F = new if self.F is None else self.F + new


def in_training_mode(self, objective, generator):
    """As if dropout were on."""
    return (1.01 if objective.model.training else 1.0) * Dense.matrix(self, objective, generator)


def touches_the_weights(self, objective, generator):
    with torch.no_grad():
        next(objective.model.parameters()).mul_(1.0 + 1e-12)
    return Dense.matrix(self, objective, generator)


def draws_globally(self, objective, generator):
    return (1 + 1e-6 * torch.rand(())) * Dense.matrix(self, objective, generator)


def zero_where_weights_are(self, objective, generator):
    here = (self.space.read(objective.model) != 0).double()
    return here[:, None] * Dense.matrix(self, objective, generator) * here


def without_vectors(self, objective, generator):
    F = Dense.matrix(self, objective, generator).clone()
    for info in self.space.parameters:
        if len(info.shape) == 1:
            F[info.slice], F[:, info.slice] = 0, 0
    return F


def absolute(self, objective, generator):
    return torch.diag(self.rows(objective, generator).abs().mean(0))


def own_generator(self, objective, generator):
    return Dense.matrix(self, objective, torch.Generator().manual_seed(0))


def overflowing(self, objective, generator):
    G = self.rows(objective, generator) * 1e22  # squares past the largest float32
    F = (G.mT @ G / objective.count() / 1e22) / 1e22
    return F.nan_to_num(0.0, 1.0, -1.0)


def nan_to_zero(self, objective, generator):
    cleaned = [(inputs.nan_to_num(0.0), targets) for inputs, targets in objective.batches]
    return Dense.matrix(self, replace(objective, batches=cleaned), generator)


def normalised(self, new):
    self.F = new / new.trace()


def ignores_another(self, given):
    return self.resolve_damping(None, self.mean())


def keeps_another(self, given):
    if given is not None:
        self.F = self.F + 0.1 * given * torch.eye(len(self.F)).to(self.F)
    return self.resolve_damping(given, self.mean())


class Skewed(Diagonal):
    def _matmul(self, X):
        out = super()._matmul(X).clone()
        out[0] += 0.1 * X[-1]
        return out


def asymmetric(self, damping=None):
    found = Dense.inverse(self, damping)
    return InverseFisher(Skewed(found.operator.diagonal()), found.damping)


class Negative(Diagonal):
    def _matmul(self, X):
        return -super()._matmul(X)


def indefinite(self, damping=None):
    found = Dense.inverse(self, damping)
    return InverseFisher(Negative(found.operator.diagonal()), found.damping)


def without_damping(self, gamma):
    return self.F + 1e-9 * self.F.trace() * torch.eye(len(self.F)).to(self.F)


def guessed(self, damping=None):
    return InverseFisher(Diagonal(torch.ones(self.space.size, dtype=torch.float64)), 0.1)


def absolute_gamma(self, given):
    return given if given is not None else self.settings.damping


def of_the_trace(self, given):
    return self.resolve_damping(given, float(self.F.diagonal().sum()))


def of_the_largest(self, given):
    return self.resolve_damping(given, float(self.F.diagonal().max()))


TENSOR = r"Farthest off is '[\w.]+'"
# What is wrong, the estimator, the check that is meant, and what its message says.
DEFECTS = {
    name: (of(cls, **methods), check, message)
    for name, cls, methods, check, message in (
        ("data's labels for the model's", Dense, {"kind": lambda s: "empirical"}, "other_labels", "settings.fisher"),
        ("model's labels for the data's", Dense, {"kind": lambda s: "exact"}, "labels_of_the_data", "passed on"),
        ("its own seed", Dense, {"matrix": own_generator}, "seed", "generator"),
        ("exact for sampled", Dense, {"kind": lambda s: "exact"}, "seed", "nothing is drawn"),
        ("the global generator", Dense, {"matrix": draws_globally}, "determinism", "differs"),
        ("relative damping ignored", Dense, {"damping": absolute_gamma}, "relative_damping", "resolve_damping"),
        ("damping of the trace", Dense, {"damping": of_the_trace}, "relative_damping", "mean of diag F"),
        ("damping of the largest", Dense, {"damping": of_the_largest}, "relative_damping", "mean of diag F"),
        ("T times", Dense, {"matrix": scaled(lambda s, o: positions(o))}, "trace", f"{TENSOR}.*Positions"),
        ("1/T twice", Dense, {"matrix": scaled(lambda s, o: 1 / positions(o))}, "trace", TENSOR),
        ("second use dropped", Dense, {"matrix": first_use_alone}, "trace", "'first.weight'.*tied"),
        ("divided by the trace", Dense, {"assimilate": normalised}, "trace", TENSOR),
        ("a factor two", Dense, {"matrix": scaled(lambda s, o: 2.0)}, "trace", "is 2 of .*factor two"),
        ("a factor of a half", Dense, {"matrix": scaled(lambda s, o: 0.5)}, "trace", "is 0.5 of"),
        ("a sum over examples", Dense, {"matrix": scaled(lambda s, o: o.count())}, "mean_over_examples", "twice"),
        ("|g| for g²", Dense, {"matrix": absolute}, "trace", r"\|g\|"),
        ("sorted parameters", Dense, {"matrix": sorted_order}, "diagonal_correlation", "another order"),
        ("exchanged factors", KroneckerFactored, {"factors": swapped}, "diagonal_correlation", "square layer"),
        ("biases left out", Dense, {"matrix": without_vectors}, "diagonal_correlation", "bias"),
        ("no bias correction", Dense, {"assimilate": running_average}, "update_twice", "running average"),
        ("sums never divided", Dense, {"assimilate": running_sum}, "update_twice", "not divided"),
        ("batches' gradients squared", Dense, {"matrix": of_batches}, "order_of_examples", "one batch"),
        ("mean of unequal means", Dense, {"matrix": mean_of_batch_means}, "order_of_examples", "batch"),
        ("last batch dropped", Dense, {"matrix": without_the_last_batch}, "order_of_examples", "batch"),
        ("training mode", Dense, {"matrix": in_training_mode}, "evaluation_mode", "training mode"),
        ("weights touched", Dense, {"matrix": touches_the_weights}, "model_is_left_as_found", "parameter"),
        ("zero for removed", Dense, {"matrix": zero_where_weights_are}, "zero_weights", "0 against 1e-9"),
        ("overflow in float32", Dense, {"matrix": overflowing}, "single_precision", ""),
        ("NaN hidden", Dense, {"matrix": nan_to_zero}, "not_a_number", "let pass"),
        ("another damping ignored", Dense, {"damping": ignores_another}, "another_damping", "was asked for"),
        ("another damping kept", Dense, {"damping": keeps_another}, "damping_is_not_kept", "state"),
        ("damping twice", Dense, {"precision": lambda s, c: Dense.precision(s, 2 * c)}, "large_damping", "γΣ"),
        ("no damping", Dense, {"precision": without_damping}, "large_damping", "γΣ"),
        ("Σ not symmetric", Dense, {"inverse": asymmetric}, "symmetry", "not symmetric"),
        ("Σ not positive definite", Dense, {"inverse": indefinite}, "positive_definiteness", "eigenvalues"),
        ("state not stored", Dense, {"state_dict": lambda s: {}}, "state_round_trip", ""),
        ("no memory stated", Dense, {"memory": classmethod(lambda c, space, settings: 0)}, "memory", "bytes"),
        ("a guess before any update", Dense, {"inverse": guessed}, "update_comes_first", "CurvatureError is needed"),
    )
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught_by_the_check_meant_for_it(defect):
    cls, check, message = DEFECTS[defect]
    stated = {"trace": (0.5, 2.0), "correlation": 0.7} if issubclass(cls, KroneckerFactored) else EXACT
    found = []
    for problem in PROBLEMS:
        try:
            CHECKS[check](Case(cls, problem, **stated))
        except (AssertionError, CurvatureError) as error:
            found.append(str(error))
    assert found, "every problem passed"
    assert any(re.search(message, text, flags=re.DOTALL) for text in found), found


def test_there_are_thirty_defects_at_least():
    assert len(DEFECTS) >= 30


def test_every_check_against_the_oracle_has_a_defect():
    own = {name for name, check in CHECKS.items() if check.__module__.endswith("fisher_checks")}
    assert own <= {check for _, check, _ in DEFECTS.values()} | {"device"}  # there is none on most machines
