import pytest

from sparsekit.testing import PROBLEMS, estimator_checks
from sparsekit_fishleg.estimator import FishLeg

ONE_DAMPING = {"another_damping": "Q is fitted at one damping; at another it is an approximation, or refused"}
HELD_OUT = {
    "order_of_examples": "the last batches are held out, and each step learns from one batch",
    "mean_over_examples": "a batch is held out of what Q learns from",
}
CONFIGURATIONS = {
    "closed form": ({"auxiliary_steps": 0}, PROBLEMS, {}),
    "refined": ({"auxiliary_steps": 6, "check_every": 1}, ("mlp", "convolution"), ONE_DAMPING | HELD_OUT),
    "network products": (
        {"auxiliary_steps": 2, "check_every": 1, "products": "network", "start": "identity"},
        ("linear",),
        ONE_DAMPING | HELD_OUT,
    ),
    "two factors": ({"auxiliary_steps": 0, "structure": "kronecker"}, ("mlp", "tied"), ONE_DAMPING),
    "survivors": ({"auxiliary_steps": 6, "after_cut": "learn"}, ("gaussian",), ONE_DAMPING | HELD_OUT),
    "auxiliary alone": (
        {"auxiliary_steps": 6, "check_every": 2, "refresh": "auxiliary", "products": "network", "after_cut": "learn"},
        ("linear", "mlp"),
        ONE_DAMPING | HELD_OUT,
    ),
    "diagonal blocks": ({"auxiliary_steps": 0, "max_factor": 1}, ("bernoulli",), {}),
}


def parametrised():
    for label, (settings, problems, waived) in CONFIGURATIONS.items():
        for name, run in estimator_checks(FishLeg, settings, problems, waived=waived):
            yield pytest.param(run, id=f"{label}-{name}")


@pytest.mark.parametrize("check", list(parametrised()))
def test_conformance(check):
    check()
