"""Checks of an estimator's behaviour: what it reads, keeps, leaves unchanged and refuses.

Each takes a Case and raises AssertionError with what is wrong and by how much.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsekit.curvature.vectors import FisherKind
from sparsekit.errors import CurvatureError
from sparsekit.methods.interfaces import CurvatureEstimator
from sparsekit.problem.objective import Batch, Objective
from sparsekit.problem.parameters import Mask
from sparsekit.testing.case import Case, Cut, assert_identical, assert_near, cuts, dense
from sparsekit.testing.problems import in_single_precision


# -- what it says --------------------------------------------------------------------------------------------
def check_update_comes_first(case: Case) -> None:
    """`inverse` before any update is a CurvatureError, not a guess."""
    try:
        case.made(case.objective()).inverse()
    except CurvatureError:
        return
    raise AssertionError("inverse() before any update gave an operator; a CurvatureError is needed")


def check_figures(case: Case) -> None:
    """`update` returns finite floats by name."""
    objective = case.objective()
    figures = case.made(objective).update(objective, generator=torch.Generator().manual_seed(0))
    for name, value in figures.items():
        if not (isinstance(value, float) and math.isfinite(value)):
            raise AssertionError(f"update() returned {name} = {value!r}; a finite float is needed")


def check_not_a_number(case: Case) -> None:
    """A gradient that is NaN, in the first batch or the last, is a CurvatureError by the time Σ is asked for.

    Σ without an error is right only where it is bitwise that of clean data: the estimator looks at no gradient.
    """
    clean = dense(case.inverse())
    for position in (0, -1):
        objective = case.objective()
        batches = [(inputs.clone(), targets) for inputs, targets in objective.batches]
        batches[position][0][-1] = math.nan
        try:
            found = dense(case.updated(replace(objective, batches=batches)).inverse())
        except CurvatureError:
            continue
        if not torch.equal(found, clean):
            where = "first" if position == 0 else "last"
            raise AssertionError(f"NaN in the {where} batch's gradients was let pass; a CurvatureError is needed")


def check_memory(case: Case) -> None:
    """`memory` gives a positive number of bytes, no less than the state then takes.

    It measures the state alone, not the temporaries of `update` and `inverse`, which `memory` is to cover too: a
    low estimate of those passes. The state is of float64 here, where runs mostly take float32.
    """
    objective = case.objective()
    estimator = case.updated(objective)
    stated = case.estimator.memory(objective.space, estimator.settings)
    held = sum(tensor.numel() * tensor.element_size() for tensor in estimator.state_dict().values())
    if not (isinstance(stated, int) and stated > 0 and held <= stated):
        raise AssertionError(f"memory() says {stated!r} bytes; the state alone takes {held}")


# -- determinism and state -----------------------------------------------------------------------------------
def check_determinism(case: Case) -> None:
    """The same generator seed gives bitwise the same state and Σ, whatever the global generator's seed."""
    found = []
    for ambient in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ambient)
            estimator = case.updated(case.objective())
        found.append(_stored(estimator) | {"Σ": dense(estimator.inverse())})
    assert_identical("two updates with the same generator seed", *found)


def check_state_round_trip(case: Case) -> None:
    """A new estimator with the stored state has bitwise the same state, Σ and damping."""
    objective = case.objective()
    first, second = case.updated(objective), case.made(objective)
    second.load_state_dict(_stored(first))
    assert_identical("the state after a round trip", _stored(second), _stored(first))
    assert_identical("after a round trip", {"Σ": dense(second.inverse())}, {"Σ": dense(first.inverse())})
    if second.inverse().damping != first.inverse().damping:
        raise AssertionError(
            f"the damping after a round trip is {second.inverse().damping}, it was {first.inverse().damping}"
        )


def check_resume(case: Case) -> None:
    """After a cut, an update from the stored state equals an update of the estimator that went on, bitwise."""
    objective = case.objective()
    cut = _second_cut(objective)
    first, second = case.updated(objective), case.made(objective)
    first.shrink(cut.mask)
    second.load_state_dict(_stored(first))
    objective.space.write(objective.model, cut.weights)
    found = []
    for estimator in (second, first):
        estimator.update(objective, generator=torch.Generator().manual_seed(1))
        found.append(_stored(estimator) | {"Σ": dense(estimator.inverse())})
    assert_identical("an update after resuming against one without interruption", *found)


def check_adopt(case: Case) -> None:
    """Adopting the state of an update at another damping equals an update of one's own, bitwise."""
    objective = case.objective()
    own = case.updated(objective)
    for factor in (1.0, 3.0, 1e9):
        mine, other = case.made(objective), case.made(objective, damping=factor * own.settings.damping)
        if mine.statistics(mine.settings) != mine.statistics(other.settings):
            continue
        other.update(objective, generator=torch.Generator().manual_seed(0))
        adopted = mine.adopt(_stored(other))
        if factor == 1 and not adopted:
            raise AssertionError("the statistics of an estimator with the same settings were not adopted")
        if adopted:
            assert_identical("Σ from another's statistics", {"Σ": dense(mine.inverse())}, {"Σ": dense(own.inverse())})
            if mine.inverse().damping != own.inverse().damping:
                raise AssertionError(f"adopted, the damping is {mine.inverse().damping}, not {own.inverse().damping}")


def check_shrink(case: Case) -> None:
    """After `shrink` Σ can be used: for another cut before and after a refresh, and again with the full mask."""
    objective = case.objective()
    cut = _second_cut(objective)
    estimator = case.updated(objective)
    before = dense(estimator.inverse())
    estimator.shrink(cut.mask)
    _assert_cuts(estimator, cut, "after shrink")
    estimator.shrink(Mask.full(objective.space.size))
    assert_near("Σ after shrink to a mask and back to the full one", dense(estimator.inverse()), before, case.tolerance)
    estimator.shrink(cut.mask)
    objective.space.write(objective.model, cut.weights)
    estimator.update(objective, generator=torch.Generator().manual_seed(1))
    _assert_cuts(estimator, cut, "after shrink and a refresh")


def _stored(estimator: CurvatureEstimator) -> dict[str, Tensor]:
    """The state as it is read from a file: contiguous copies."""
    state = estimator.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise AssertionError(f"state_dict() holds {name} = {value!r}; tensors are needed")
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def _second_cut(objective: Objective) -> Cut:
    _, second, _ = cuts(objective)
    return second


def _assert_cuts(estimator: CurvatureEstimator, cut: Cut, when: str) -> None:
    inverse = estimator.inverse()
    kept = cut.mask.kept
    spectrum = torch.linalg.eigvalsh(dense(inverse)[kept][:, kept])
    if not float(spectrum[0]) > 0:
        raise AssertionError(f"{when}, Σ on the kept weights has the eigenvalue {float(spectrum[0]):.3e}")
    inverse.diagonal(cut.mask)
    removal = inverse.remove(cut.weights, cut.mask, cut.chosen)
    back = (cut.weights + removal.delta)[cut.mask.removed | cut.chosen]
    if bool((back != 0).any()) or not removal.increase > 0:
        raise AssertionError(
            f"{when}, {int((back != 0).sum())} of {len(back)} removed weights are not zero after the next cut, with "
            f"the predicted increase {removal.increase:.3e}"
        )


# -- damping -------------------------------------------------------------------------------------------------
def check_another_damping(case: Case) -> None:
    """`inverse(γ)` equals that of a fresh estimator whose settings have the damping γ, and says γ."""
    estimator = case.updated(case.objective())
    gamma = 3 * estimator.inverse().damping
    found = estimator.inverse(gamma)
    fresh = case.inverse(damping=gamma, damping_scale="absolute")
    for inverse in (found, fresh):
        if not math.isclose(inverse.damping, gamma):
            raise AssertionError(f"the damping {gamma:.6g} was asked for, the operator says {inverse.damping:.6g}")
    assert_near(f"Σ at another damping, {gamma:.3g}", dense(found), dense(fresh), case.tolerance)


def check_damping_is_not_kept(case: Case) -> None:
    """`inverse` at another damping changes neither the state nor what comes next; it may be refused."""
    estimator = case.updated(case.objective())
    state, before = _stored(estimator), estimator.inverse()
    try:
        estimator.inverse(3 * before.damping)
    except CurvatureError:
        return
    assert_identical("the state after inverse() at another damping", _stored(estimator), state)
    after = {"Σ": dense(estimator.inverse())}
    assert_identical("after inverse() at another damping", after, {"Σ": dense(before)})


def check_large_damping(case: Case) -> None:
    """γΣ tends to I as γ grows, so that the OBS saliency w²/2Σ_ii tends to γw²/2: magnitude."""
    inverse = case.inverse(damping=1e8, damping_scale="relative")
    truth = torch.eye(inverse.size, dtype=torch.float64)
    assert_near(f"γΣ at γ = {inverse.damping:.1e}", inverse.damping * dense(inverse), truth, 1e-4)


def check_small_damping(case: Case) -> None:
    """In float32 at γ = 1e-8 of the mean of diag F, cuts are finite and cost more than nothing, or a CurvatureError.

    Recursions in float32 give NaN, negative diagonals or negative costs once the largest eigenvalue of F passes
    about 1e7 γ.
    """
    objective = in_single_precision(case.objective())
    try:
        inverse = case.updated(objective, damping=1e-8, damping_scale="relative").inverse()
        inverse.diagonal()
        for cut in cuts(objective):
            for how in ("joint", "none"):
                removal = inverse.remove(cut.weights, cut.mask, cut.chosen, how)
                if not (bool(removal.delta.isfinite().all()) and 0 < removal.increase < math.inf):
                    raise AssertionError(
                        f"in float32 at γ = {inverse.damping:.1e}, {cut.name} ({how}) has the predicted increase "
                        f"{removal.increase:.3e} and a largest move of {float(removal.delta.abs().max()):.1e}; a "
                        "CurvatureError is needed"
                    )
    except CurvatureError:
        return


# -- examples ------------------------------------------------------------------------------------------------
def check_order_of_examples(case: Case) -> None:
    """The same examples in other batches or another order give the same Σ up to rounding."""
    batches = [*case.objective().batches]
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for kind in case.deterministic_kinds():
        _compare_batches(case, kind, "one batch", [(inputs, targets)], batches)
        _compare_batches(case, kind, "batches of one", _split(inputs, targets, 1), batches)
        _compare_batches(case, kind, "the reverse order", _split(inputs.flip(0), targets.flip(0), 4), batches)


def check_mean_over_examples(case: Case) -> None:
    """Examples given twice give the same Σ, because the Fisher is a mean, as the loss is; also a single example."""
    batches = [*case.objective().batches]
    single = [(batches[0][0][:1], batches[0][1][:1])]
    for kind in case.deterministic_kinds():
        _compare_batches(case, kind, "every example twice", batches * 2, batches)
        _compare_batches(case, kind, "a single example twice", single * 2, single)


def check_zero_weights(case: Case) -> None:
    """Σ hardly differs between weights of 0 and of 1e-9: what is zero is not therefore removed; only a mask says so."""
    for kind in case.deterministic_kinds():
        found, truth = (_with_third_of_weights(case, kind, value) for value in (0.0, 1e-9))
        assert_near(f"Σ where weights are 0 against 1e-9, fisher={kind!r}", found, truth, max(1e-5, case.tolerance))


def _with_third_of_weights(case: Case, kind: FisherKind, value: float) -> Tensor:
    objective = case.objective()
    weights = objective.space.read(objective.model)
    weights[::3] = value
    objective.space.write(objective.model, weights)
    return dense(case.updated(objective, fisher=kind).inverse())


def _compare_batches(
    case: Case, kind: FisherKind, what: str, batches: Sequence[Batch], reference: Sequence[Batch]
) -> None:
    found, truth = (
        dense(case.updated(replace(case.objective(), batches=given), fisher=kind).inverse())
        for given in (batches, reference)
    )
    assert_near(f"Σ from {what}, fisher={kind!r}", found, truth, case.tolerance)


def _split(inputs: Tensor, targets: Tensor, size: int) -> list[Batch]:
    return list(zip(inputs.split(size), targets.split(size), strict=True))


# -- the model -----------------------------------------------------------------------------------------------
def check_evaluation_mode(case: Case) -> None:
    """A model in training mode gives bitwise the Σ of evaluation mode: no dropout, no batch statistics."""
    objective = case.objective()
    objective.model.train()
    found = dense(case.updated(objective).inverse())
    assert_identical("from a model in training mode", {"Σ": found}, {"Σ": dense(case.inverse())})


def check_model_is_left_as_found(case: Case) -> None:
    """Weights, buffers, gradients, flags, modes, hooks, examples and global random states are as before."""
    objective = case.objective()
    model = objective.model
    model.train()
    list(model.modules())[-1].eval()
    tensors = list(objective.space.tensors(model).values())
    tensors[0].requires_grad_(False)
    tensors[-1].grad = torch.ones_like(tensors[-1])
    before, before_flags = _tensors_around(objective), _flags_around(objective)
    estimator = case.updated(objective)
    estimator.inverse()
    estimator.shrink(_second_cut(objective).mask)
    assert_identical("after update, inverse and shrink", _tensors_around(objective), before)
    after_flags = _flags_around(objective)
    for what, flag in before_flags.items():
        if after_flags.get(what) != flag:
            raise AssertionError(f"after update, inverse and shrink: {what} differs")


def _tensors_around(objective: Objective) -> dict[str, Tensor]:
    """Copies of the tensors that an estimator must leave unchanged, by description."""
    found = {"the state of torch's global generator": torch.get_rng_state()}
    for name, parameter in objective.model.named_parameters():
        found[f"parameter '{name}'"] = parameter.detach().clone()
        if parameter.grad is not None:
            found[f"the gradient of '{name}'"] = parameter.grad.clone()
    for name, buffer in objective.model.named_buffers():
        found[f"buffer '{name}'"] = buffer.clone()
    for index, (inputs, targets) in enumerate(objective.batches):
        found |= {f"the input of batch {index}": inputs.clone(), f"the target of batch {index}": targets.clone()}
    return found


def _flags_around(objective: Objective) -> dict[str, object]:
    """Other states that it must leave unchanged, by description."""
    found: dict[str, object] = {
        "the state of Python's global generator": random.getstate(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's default type": torch.get_default_dtype(),
    }
    for name, parameter in objective.model.named_parameters():
        found |= {f"the identity of '{name}'": id(parameter), f"requires_grad of '{name}'": parameter.requires_grad}
    for name, module in objective.model.named_modules():
        hooks = {key: list(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        found |= {f"the training mode of '{name}'": module.training, f"the register of hooks of '{name}'": hooks}
    return found
