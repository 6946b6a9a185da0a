"""Checks that an estimate is one of the Fisher that was asked for, against a dense oracle and against itself.

They need no `expected` matrix: an approximation passes within the bounds that its author states. Each takes a Case and
raises AssertionError with what was measured and the likeliest causes. Estimators whose Σ is not in units of the loss
(`unit`) are not estimates of a Fisher and pass.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparsekit.curvature.vectors import FisherKind
from sparsekit.problem.likelihoods import Bernoulli, Categorical
from sparsekit.problem.objective import Objective
from sparsekit.testing.case import Case, assert_near, dense
from sparsekit.testing.oracles import DenseKind, dense_fisher
from sparsekit.testing.problems import in_single_precision

#: In float32 against float64, relative to the largest entry of Σ: rounding of gradients, and of eigenvectors.
SINGLE = 1e-3


def is_of_a_fisher(case: Case) -> bool:
    """Whether Σ claims to be the inverse of a damped Fisher."""
    objective = case.objective()
    return case.estimator.unit(case.made(objective).settings) == "loss"


def check_other_labels(case: Case) -> None:
    """Other labels leave Σ bitwise equal, unless `fisher` is empirical: the model's labels count, not the data's."""
    if not is_of_a_fisher(case):
        return
    for kind in case.kinds("exact", "importance", "sampled"):
        objective = case.objective()
        others = [(inputs, _other(targets, objective)) for inputs, targets in objective.batches]
        found = dense(case.updated(replace(objective, batches=others), fisher=kind).inverse())
        if not torch.equal(found, dense(case.updated(objective, fisher=kind).inverse())):
            raise AssertionError(
                f"with other labels in the data Σ is another, fisher={kind!r}: only the empirical Fisher depends on "
                "them. Is settings.fisher passed on, as in layer_gradients(objective, self.settings.fisher, …)?"
            )


def check_labels_of_the_data(case: Case) -> None:
    """With fisher='empirical' other labels give another Σ."""
    if not is_of_a_fisher(case) or not case.kinds("empirical"):
        return
    objective = case.objective()
    others = [(inputs, _other(targets, objective)) for inputs, targets in objective.batches]
    found = dense(case.updated(replace(objective, batches=others), fisher="empirical").inverse())
    if torch.equal(found, dense(case.updated(objective, fisher="empirical").inverse())):
        raise AssertionError(
            "with other labels in the data Σ is the same, fisher='empirical': its gradients are those of the data's "
            "labels. Is settings.fisher passed on?"
        )


def check_seed(case: Case) -> None:
    """Another seed of the generator gives another Σ where labels are sampled."""
    if not is_of_a_fisher(case) or not case.kinds("sampled"):
        return
    first, second = (dense(case.updated(case.objective(), seed=s, fisher="sampled").inverse()) for s in (0, 1))
    if torch.equal(first, second):
        raise AssertionError(
            "two seeds of the generator give the same Σ, fisher='sampled': nothing is drawn from it. Is `generator` "
            "passed on, or is one of its own used?"
        )


def check_relative_damping(case: Case) -> None:
    """With damping_scale='relative' γ is `damping` times the mean of diag(H − γI), within the bounds of the trace."""
    if not is_of_a_fisher(case):
        return
    for damping in (0.03, 0.3):
        inverse = case.inverse(damping=damping, damping_scale="relative", **_plain(case))
        mean = float(torch.linalg.inv(dense(inverse)).diagonal().mean()) - inverse.damping
        ratio = mean * damping / inverse.damping
        if not case.trace[0] <= ratio <= case.trace[1]:
            raise AssertionError(
                f"at the relative damping {damping} γ is {inverse.damping:.4g}, and the mean of diag(H − γI) times "
                f"{damping} is {mean * damping:.4g}: {ratio:.3g} of it, {case.trace[0]:g} to {case.trace[1]:g} are "
                "allowed. Is γ made by resolve_damping from the mean of diag F?"
            )


def check_update_twice(case: Case) -> None:
    """Two updates on the same examples, nothing drawn, give the Σ of one: a mean of equals is the same."""
    for kind in case.deterministic_kinds():
        objective = case.objective()
        once, twice = case.updated(objective, fisher=kind), case.updated(objective, fisher=kind)
        twice.update(objective, generator=torch.Generator().manual_seed(0))
        assert_near(
            f"Σ after two updates on the same examples against one, fisher={kind!r} (a running average without "
            "correction of its first step? sums that are not divided?)",
            dense(twice.inverse()),
            dense(once.inverse()),
            max(1e-6, case.tolerance),
            objective.space,
        )


def check_trace(case: Case) -> None:
    """The trace of H − γI is the oracle's within the bounds of the case."""
    found, truth, kind = _both_diagonals(case)
    if found is None or truth is None:
        return
    ratio = float(found.sum() / truth.sum())
    if not case.trace[0] <= ratio <= case.trace[1]:
        raise AssertionError(
            f"the trace of H − γI is {ratio:.3g} of the Fisher's, fisher={kind!r}; {case.trace[0]:g} to "
            f"{case.trace[1]:g} are allowed. {_worst_tensor(found, truth, case.objective())} (A factor two or a half? "
            "Positions counted T times, or a mean over them taken twice? The second use of a tied weight? |g| for g²?)"
        )


def check_diagonal_correlation(case: Case) -> None:
    """Diag(H − γI) goes with the oracle's: their correlation is at least that of the case."""
    found, truth, kind = _both_diagonals(case)
    if found is None or truth is None:
        return
    measured = float(torch.corrcoef(torch.stack([found, truth]))[0, 1])
    if not measured >= case.correlation:
        raise AssertionError(
            f"diag(H − γI) has the correlation {measured:.2f} with the Fisher's, fisher={kind!r}; {case.correlation:g} "
            f"at least is needed. {_worst_tensor(found, truth, case.objective())} (Parameters in another order than "
            "the space's? Inputs and outputs of a square layer exchanged? Rows of another tensor?)"
        )


def check_single_precision(case: Case) -> None:
    """In float32 Σ is that of float64, to a thousandth of its largest entry."""
    for kind in case.deterministic_kinds():
        objective = case.objective()
        truth = dense(case.updated(objective, fisher=kind).inverse())
        single = in_single_precision(case.objective())
        found = case.updated(single, fisher=kind).inverse()
        assert_near(f"Σ in float32, fisher={kind!r}", dense(found), truth, SINGLE, objective.space)


def check_device(case: Case) -> None:
    """On `case.device` Σ is that of the CPU; without one, on a GPU if there is any."""
    device = case.device or ("cuda" if torch.cuda.is_available() else None)
    if device is None:
        return
    for kind in case.deterministic_kinds():
        truth = dense(case.updated(case.objective(), fisher=kind).inverse())
        objective = case.objective()
        objective.model.to(device)
        found = dense(case.updated(objective, fisher=kind).inverse()).cpu()
        assert_near(f"Σ on {device}, fisher={kind!r}", found, truth, 1e-5, objective.space)


def _plain(case: Case) -> dict[str, FisherKind]:
    """A kind of Fisher without a draw, if the settings allow one."""
    kinds = case.deterministic_kinds()
    return {"fisher": kinds[0]} if kinds else {}


def _both_diagonals(case: Case) -> tuple[Tensor | None, Tensor | None, DenseKind]:
    """Diag(H − γI) and the oracle's diagonal, with the kind of Fisher; (None, None, …) where there is no such."""
    kinds = case.deterministic_kinds()
    kind: DenseKind = "exact" if not kinds or kinds[0] == "exact" else "empirical"
    if not is_of_a_fisher(case) or not kinds:
        return None, None, kind
    objective = case.objective()
    inverse = case.updated(objective, fisher=kind).inverse()
    found = torch.linalg.inv(dense(inverse)).diagonal() - inverse.damping
    return found, dense_fisher(objective, kind).diagonal(), kind


def _worst_tensor(found: Tensor, truth: Tensor, objective: Objective) -> str:
    """Say which tensor is farthest off, and by which factor."""
    ratios = {
        info.name: float(found[info.slice].sum() / truth[info.slice].sum().clamp_min(1e-300))
        for info in objective.space.parameters
    }
    worst = max(ratios, key=lambda name: abs(torch.tensor(max(ratios[name], 1e-9)).log()))
    return f"Farthest off is '{worst}', with {ratios[worst]:.3g} of its trace."


def _other(targets: Tensor, objective: Objective) -> Tensor:
    """Labels of the same form, all of them others."""
    likelihood = objective.likelihood
    if isinstance(likelihood, Categorical):
        inputs, _ = next(iter(objective.batches))
        with torch.no_grad():
            classes = objective.model(inputs).shape[1]
        return (targets + 1) % classes
    return 1 - targets if isinstance(likelihood, Bernoulli) else targets + 1
