import pytest
import torch

from sparsekit.testing import PROBLEMS, block_mask, damped, dense_fisher, dense_rows, estimator_checks
from sparsekit_obs.estimator import OptimalBrainSurgeon
from sparsekit_obs.layerwise import LayerwiseSurgeon


def blocks(objective, settings):
    sizes = objective.space.stretches(settings.block_size, across_tensors=settings.across_layers)
    return damped(dense_fisher(objective, settings.fisher) * block_mask(sizes), settings)


# With its own defaults; what it is built on is checked in full in the core.
CHECKS = estimator_checks(OptimalBrainSurgeon, problems=("convolution", "tied"), expected=blocks, solve_tolerance=1e-7)


@pytest.mark.parametrize("check", [pytest.param(run, id=name) for name, run in CHECKS])
def test_conformance(check):
    check()


def layers(objective, settings):
    """The Hessian of Σ_n ‖layer(x_n; W) − layer(x_n; W₀)‖² / N by automatic differentiation, layer by layer, damped."""
    space, uses = objective.space, {name: [] for name in objective.space.names}
    owners = [
        (module, name)
        for name, parameter in objective.model.named_parameters()
        for module in objective.model.modules()
        if getattr(module, "weight", None) is parameter and name in uses
    ]
    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: uses[name].append((module, args[0])))
        for module, name in owners
    ]
    with torch.no_grad():
        for inputs, _ in objective.batches:
            objective.model(inputs)
    for hook in hooks:
        hook.remove()
    H, raw = torch.zeros(space.size, space.size, dtype=torch.float64), {}
    gradients = space.unflatten_rows(dense_rows(objective, "exact")) if settings.allocation == "fisher" else {}
    weights = space.unflatten(space.read(objective.model))
    for info in space.parameters:
        for module, x in uses[info.name]:
            J = torch.func.jacrev(
                lambda w, module=module, x=x: torch.func.functional_call(module, {"weight": w}, (x,))
            )(module.weight.detach())
            J = J.reshape(-1, info.size)
            H[info.slice, info.slice] += 2 * J.mT @ J / objective.count()
        diagonal = H.diagonal()[info.slice]
        raw[info.name] = H[info.slice, info.slice].clone()
        gamma = settings.damping * (float(diagonal.mean()) if settings.damping_scale == "relative" else 1.0)
        diagonal += torch.where(diagonal == 0, LayerwiseSurgeon.DEAD * gamma, gamma)
        width = info.size // info.shape[0]
        rows = [slice(row * width, (row + 1) * width) for row in range(info.shape[0])]
        here = H[info.slice, info.slice]
        factors = torch.ones(len(rows), dtype=torch.float64)
        if settings.allocation == "error":
            w = weights[info.name].flatten()
            factors /= 0.5 * w @ raw[info.name] @ w
        elif settings.allocation == "fisher":
            lengths = gradients[info.name].flatten(2).square().sum((0, 2)) / objective.count()
            factors = lengths / torch.stack([raw[info.name].diagonal()[row].sum() for row in rows])
            factors = factors.clamp_min(LayerwiseSurgeon.LEAST * factors.max())
        for row, factor in zip(rows, factors, strict=True):
            here[row, row] *= factor
    return H


# Problems `linear` and `convolution` prune biases and normalisation, which this method refuses.
WEIGHTS_ALONE = [name for name in PROBLEMS if name not in ("linear", "convolution")]
LAYERWISE = {
    "relative": ({}, WEIGHTS_ALONE),
    "absolute": ({"damping": 0.1, "damping_scale": "absolute"}, ["mlp", "grouped"]),
    "by error": ({"allocation": "error"}, ["mlp", "grouped"]),
    "by Fisher": ({"allocation": "fisher", "fisher": "exact"}, WEIGHTS_ALONE),
}
WAIVED = {"large_damping": "a relative γ is of each layer's own diagonal: γΣ tends to I in each layer, not with one γ"}
LAYERWISE_CHECKS = [
    pytest.param(run, id=f"{label}-{name}")
    for label, (settings, problems) in LAYERWISE.items()
    for name, run in estimator_checks(LayerwiseSurgeon, settings, problems, layers, waived=WAIVED, solve_tolerance=1e-7)
]


@pytest.mark.parametrize("check", LAYERWISE_CHECKS)
def test_conformance_layer_by_layer(check):
    check()
