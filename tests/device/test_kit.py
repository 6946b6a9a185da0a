"""Estimators on an accelerator give the Σ of the CPU; a tensor without a device in the product is found."""

import sys

import pytest
import torch

from sparsekit.registry.installed import load_registry
from sparsekit.testing import estimator_checks

pytestmark = pytest.mark.gpu

REGISTRY = load_registry()
ESTIMATORS = sorted({*REGISTRY.names("estimator")} - {"identity"})


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_gives_the_inverse_of_the_cpu(name, accelerator):
    estimator = REGISTRY.get("estimator", name)
    given = {**getattr(estimator, "conformance", {}), "device": str(accelerator)}
    mine = [run for check, run in estimator_checks(estimator, **given) if "device" in check]
    assert mine
    for run in mine:
        run()


PLANTED = {
    "pruner": ("ones", "sparsekit/problem/parameters.py", "diagonal"),
    "plugin": ("zeros_like", "sparsekit_obs/saliencies.py", "obs, greedy"),
    "flagship": ("zeros_like", "sparsekit_fishleg/products.py", "fishleg, trained"),
    "reconstruction": ("zeros_like", "sparsekit/reconstruction/solve.py", "magnitude"),
}


@pytest.mark.parametrize("where", PLANTED)
def test_a_tensor_without_a_device_is_found(where, accelerator, small_run, tmp_path, monkeypatch):
    name, file, kind = PLANTED[where]
    original, planted = getattr(torch, name), 0

    def forgetful(*arguments, **named):
        nonlocal planted
        made = original(*arguments, **named)
        if not sys._getframe(1).f_code.co_filename.endswith(file):
            return made
        planted += 1
        return made.cpu()

    monkeypatch.setattr(torch, name, forgetful)
    with pytest.raises(RuntimeError, match="same device"):
        small_run(accelerator, tmp_path, kind)
    assert planted
