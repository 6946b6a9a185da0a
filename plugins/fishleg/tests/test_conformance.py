import pytest

from sparsekit.testing import PROBLEMS, block_mask, damped, dense_fisher, estimator_checks
from sparsekit_fishleg.estimator import FishLeg

ONE_DAMPING = {"another_damping": "Q is fitted at one damping; at another it is an approximation, or refused"}
LEARNS = {
    "update_twice": "a second update learns on",
    "single_precision": "steps of an optimiser amplify rounding",
}
UNFINISHED = {
    name: "two steps from I/γ are not yet an estimate of the Fisher"
    for name in ("trace", "relative_damping", "diagonal_correlation")
}
OUTER = {
    name: "the free diagonal fits that of Q, and H follows as it may"
    for name in ("trace", "relative_damping", "diagonal_correlation")
}
HELD_OUT = LEARNS | {
    "order_of_examples": "the last batches are held out, and each step learns from one batch",
    "mean_over_examples": "a batch is held out of what Q learns from",
}
CONFIGURATIONS = {
    "closed form": ({"auxiliary_steps": 0}, PROBLEMS, {}),
    "refined": ({"auxiliary_steps": 6, "check_every": 1}, ("mlp", "convolution"), ONE_DAMPING | HELD_OUT),
    "network products": (
        {"auxiliary_steps": 2, "check_every": 1, "products": "network", "start": "identity"},
        ("linear",),
        ONE_DAMPING | HELD_OUT | UNFINISHED,
    ),
    "two factors": ({"auxiliary_steps": 0, "structure": "kronecker"}, ("mlp", "tied"), ONE_DAMPING),
    "auxiliary alone": (
        {"auxiliary_steps": 6, "check_every": 2, "refresh": "auxiliary", "products": "network"},
        ("linear", "mlp"),
        ONE_DAMPING | HELD_OUT,
    ),
    "outer diagonal": ({"auxiliary_steps": 6, "structure": "outer"}, ("mlp",), ONE_DAMPING | HELD_OUT | OUTER),
    "three factors": ({"auxiliary_steps": 0, "structure": "three-factor"}, ("convolution", "grouped"), {}),
    "three factors, refined": (
        {"auxiliary_steps": 6, "structure": "three-factor"},
        ("convolution", "grouped"),
        ONE_DAMPING | HELD_OUT,
    ),
    "a block for each output": ({"auxiliary_steps": 0, "structure": "blocks"}, ("mlp", "grouped"), {}),
    "dense": ({"auxiliary_steps": 0, "structure": "dense"}, ("mlp", "tied", "grouped"), {}),
    "diagonal blocks": ({"auxiliary_steps": 0, "max_factor": 1}, ("bernoulli",), {}),
    "diagonal": ({"auxiliary_steps": 0, "structure": "diagonal"}, ("bernoulli",), {}),
}


def whole_tensors(objective, settings):
    sizes = [info.size for info in objective.space.parameters]
    return damped(dense_fisher(objective, settings.fisher) * block_mask(sizes), settings)


def outputs(objective, settings):
    """A block for each row of a matrix; the problems' vectors are not asked for."""
    sizes = [info.size // info.shape[0] for info in objective.space.parameters for _ in range(info.shape[0])]
    return damped(dense_fisher(objective, settings.fisher) * block_mask(sizes), settings)


EXACT = {
    "dense": ({"structure": "dense"}, ("no_bias",), whole_tensors),
    "by size": ({"dense_below": 1000}, ("no_bias", "gaussian"), whole_tensors),
    "a block for each output": ({"structure": "blocks"}, ("no_bias",), outputs),
}


def parametrised():
    for label, (settings, problems, expected) in EXACT.items():
        exact = settings | {"fisher": "exact", "auxiliary_steps": 0}
        for name, run in estimator_checks(FishLeg, exact, problems, expected=expected, tolerance=1e-6):
            yield pytest.param(run, id=f"exact, {label}-{name}")
    for label, (settings, problems, waived) in CONFIGURATIONS.items():
        for name, run in estimator_checks(FishLeg, settings, problems, waived=waived):
            yield pytest.param(run, id=f"{label}-{name}")


@pytest.mark.parametrize("check", list(parametrised()))
def test_conformance(check):
    check()
