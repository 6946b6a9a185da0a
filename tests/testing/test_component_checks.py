"""The kits for saliencies, patterns, schedules and tasks: all built-in ones pass, planted defects fail."""

import pytest
import torch

from sparsekit.methods.interfaces import Saliency, Schedule
from sparsekit.methods.loss_models import LinearModel, OptimalBrainDamage, QuadraticModel
from sparsekit.methods.measured_rates import MeasuredRates
from sparsekit.methods.patterns import NM, Block, Uniform, Unstructured
from sparsekit.methods.saliencies import Magnitude, OptimalBrainSurgeon, Random, RowSurgeon
from sparsekit.methods.schedules import Cubic, Exponential, Linear, OneShot
from sparsekit.tasks import Digits
from sparsekit.testing import pattern_checks, saliency_checks, schedule_checks, task_checks
from sparsekit_obs.saliencies import GreedySurgeon, GroupSurgeon
from sparsekit_woodfisher.saliencies import WoodTaylor

FOUR = {"size": 4, "axis": "memory"}
RIGHT = {
    "magnitude": saliency_checks(Magnitude, expected=lambda c: c.weights**2),
    "random": saliency_checks(Random),
    "obs": saliency_checks(OptimalBrainSurgeon, exact="joint"),
    "obs-rows": saliency_checks(RowSurgeon),
    "linear-model": saliency_checks(LinearModel, expected=lambda c: (c.gradient * c.weights).abs()),
    "quadratic-model": saliency_checks(QuadraticModel, exact="none"),
    "obd": saliency_checks(OptimalBrainDamage, exact="none"),
    "obs-greedy": saliency_checks(GreedySurgeon),
    "obs-group": saliency_checks(GroupSurgeon, units=lambda space: Block(Block.Settings(**FOUR)).units(space)),
    "woodtaylor": saliency_checks(WoodTaylor, exact="joint"),
    "unstructured": pattern_checks(Unstructured, {"floor": 0}),
    "unstructured, floor": pattern_checks(
        Unstructured, waived={"nested": "a floor holds more weights back where fewer are left"}
    ),
    "uniform": pattern_checks(Uniform),
    "measured-rates": pattern_checks(MeasuredRates, {"floor": 0}),
    "n:m": pattern_checks(NM),
    "block": pattern_checks(Block, {"floor": 0}),
    **{s.name: schedule_checks(s) for s in (OneShot, Cubic, Linear, Exponential)},
    "digits": task_checks(lambda: Digits(Digits.Settings()), other=None),
}


@pytest.mark.parametrize(
    "check", [pytest.param(run, id=f"{label}-{name}") for label, checks in RIGHT.items() for name, run in checks]
)
def test_built_in_components_pass(check):
    check()


def saliency(score):
    return type("Wrong", (Saliency,), {"name": "wrong", "score": lambda self, context: score(context)})


def touching(context):
    context.weights.mul_(2.0)
    return context.weights.square()


SALIENCIES = {
    "scores": (saliency(lambda c: c.weights / 0.0), "not finite"),
    "removed_weights": (saliency(lambda c: 1 / torch.where(c.mask.kept.all(), 1.0, 0.0) * c.weights), "divided by"),
    "same_seed": (saliency(lambda c: torch.rand(c.weights.shape, dtype=torch.float64)), "draw from it alone"),
    "nothing_changes": (saliency(touching), "changed weights or mask"),
    "exact_on_a_quadratic": (saliency(lambda c: c.weights**2 / c.inverse.diagonal()), "missing ½"),
}


@pytest.mark.parametrize("check", SALIENCIES)
def test_a_wrong_saliency_is_caught(check):
    wrong, message = SALIENCIES[check]
    with pytest.raises(AssertionError, match=message):
        dict(saliency_checks(wrong, exact="joint"))[check]()


class Base(Unstructured):
    def __init__(self, settings):
        super().__init__(Unstructured.Settings(floor=0))


def pattern(**methods):
    return type("Wrong", (Base,), methods)


def one_too_many(self, scores, mask, count, space):
    return Base.choose(self, scores, mask, min(count + 1, space.size), space)


def again(self, scores, mask, count, space):
    return Base.choose(self, scores, type(mask).full(space.size), count, space)


def highest_at_half(self, scores, mask, count, space):
    return Base.choose(self, scores if count < 0.45 * space.size else -scores, mask, count, space)


PATTERNS = {
    "exact_counts": (pattern(choose=one_too_many), "was the count"),
    "removed_once": (pattern(choose=again), "removed before"),
    "nested": (pattern(choose=highest_at_half), "not nested"),
    "ties": (pattern(choose=lambda s, x, mask, n, space: x < x.median()), "equal scores"),
}


@pytest.mark.parametrize("check", PATTERNS)
def test_a_wrong_pattern_is_caught(check):
    wrong, message = PATTERNS[check]
    with pytest.raises(AssertionError, match=message):
        dict(pattern_checks(wrong))[check]()


def test_a_pattern_that_takes_more_of_a_group_is_caught():
    class Greedy(NM):
        def choose(self, scores, mask, count, space):
            return Unstructured(Unstructured.Settings(floor=0)).choose(scores, mask, count, space)

    with pytest.raises(AssertionError, match="a group loses"):
        dict(pattern_checks(Greedy))["groups"]()


@pytest.mark.parametrize(
    ("check", "values", "message"),
    [
        ("rises", lambda s, a, b, n: [b] * n, "does not rise"),
        ("reaches", lambda s, a, b, n: [a + 0.99 * (b - a) * (t + 1) / n for t in range(n)], "is due"),
    ],
)
def test_a_wrong_schedule_is_caught(check, values, message):
    wrong = type("Wrong", (Schedule,), {"name": "wrong", "sparsities": values})
    with pytest.raises(AssertionError, match=message):
        dict(schedule_checks(wrong))[check]()


def task(**methods):
    return lambda: type("Wrong", (Digits,), methods)(Digits.Settings())


def shuffled(self, split, **how):
    found = list(Digits.batches(self, split, **how))
    return found[::-1] if how["batch_size"] == 7 else found


def one_for_all(self, split, **how):
    return Digits.batches(self, "tuning" if split == "reporting" else split, **how)


def unlimited(self, split, *, batch_size, limit=None, **how):
    return Digits.batches(self, split, batch_size=batch_size, **how)


def undrawn(self, split, *, generator=None, **how):
    return Digits.batches(self, split, **how)


def of_batches(self, model, split):
    with torch.no_grad():
        losses = [self.likelihood.losses(model(x), y).mean() for x, y in self.batches(split, batch_size=200)]
    return {"loss": float(torch.stack(losses).mean())}


CACHED = []


def the_same_object(self):
    if not CACHED:
        CACHED.append(Digits.model(self))
    return CACHED[0]


TASKS = {
    "sizes": (task(size=lambda s, split: 17), "its batches have"),
    "order": (task(batches=shuffled), "another order"),
    "draws": (task(batches=undrawn), "two generator seeds draw the same"),
    "limit": (task(batches=unlimited), "gave batches of"),
    "disjoint_splits": (task(batches=one_for_all), "chosen on what is reported"),
    "model": (task(model=the_same_object), "same object twice"),
    "measure": (task(measure=of_batches), "a mean of means"),
}


@pytest.mark.parametrize("check", TASKS)
def test_a_wrong_task_is_caught(check):
    wrong, message = TASKS[check]
    with pytest.raises(AssertionError, match=message):
        dict(task_checks(wrong))[check]()


def test_other_data_with_the_same_fingerprint_is_caught():
    with pytest.raises(AssertionError, match="other data has the same fingerprint"):
        dict(task_checks(task(), other=task()))["fingerprint"]()


def test_unknown_waivers_are_refused():
    with pytest.raises(ValueError, match="no check 'nest'; known: exact_counts"):
        pattern_checks(Unstructured, waived={"nest": "a reason"})
