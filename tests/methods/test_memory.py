"""What estimators say that they need, against what they take."""

from itertools import accumulate

import pytest
import torch
from torch import nn

from sparsekit import Categorical, Mask, Objective, ParameterSpace
from sparsekit.curvature import RunningSum, layer_gradients, layer_gradients_memory
from sparsekit.methods.estimators import DiagonalFisher
from sparsekit_mfac.estimator import MFAC
from sparsekit_obs.estimator import OptimalBrainSurgeon
from sparsekit_obs.layerwise import LayerwiseSurgeon


def peak(run):
    """Bytes held at most at one time among those allocated in a call, on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (OptimalBrainSurgeon, {}),
        (OptimalBrainSurgeon, {"block_size": 30, "average": 3}),
        (OptimalBrainSurgeon, {"block_size": 80, "damping": 1e-6, "damping_scale": "absolute"}),
        (OptimalBrainSurgeon, {"store": "rows", "block_size": 2000}),
        (OptimalBrainSurgeon, {"store": "rows", "block_size": 200}),
        (OptimalBrainSurgeon, {"store": "rows", "block_size": 2000, "average": 3}),
        (MFAC, {}),
        (MFAC, {"damping": 1e-5}),
        (LayerwiseSurgeon, {"slice_mebibytes": 1}),
        (LayerwiseSurgeon, {"slice_mebibytes": 8}),
        (LayerwiseSurgeon, {"slice_mebibytes": 1, "allocation": "fisher"}),
        (DiagonalFisher, {}),
    ],
    ids=str,
)
def test_the_memory_stated_covers_the_peak_over_two_cuts_and_a_refresh(kind, given, monkeypatch):
    monkeypatch.setattr("sparsekit.curvature.inputs.PATCH_BYTES", 1 << 18)
    monkeypatch.setattr("sparsekit.curvature.layers.SLICE", 1 << 14)  # layers of one position form no gradients
    settings = kind.Settings(**({"examples": 96, "batch_size": 16} | given))
    model = nn.Sequential(nn.Linear(120, 200), nn.Tanh(), nn.Linear(200, 10))
    batches = [(torch.randn(16, 120), torch.randint(10, (16,))) for _ in range(6)]
    objective = Objective(model, Categorical(), batches, ParameterSpace.of(model))
    weights, order = objective.space.read(model), torch.rand(objective.space.size)

    def cut(inverse, before, after):
        mask = Mask(order >= before)
        inverse.diagonal(mask)
        inverse.remove(torch.where(mask.kept, weights, 0.0), mask, mask.kept & (order < after))

    def run():
        made, generator = kind(objective.space, settings), torch.Generator().manual_seed(0)
        for _ in range(2):
            made.update(objective, generator=generator)
            cut(made.inverse(), 0.0, 0.3)
            cut(made.inverse(), 0.3, 0.6)

    stated, measured = kind.memory(objective.space, settings), peak(run)
    assert measured <= stated < 3 * measured


@pytest.mark.parametrize("batch", [1, 16])
def test_the_memory_stated_for_passes_covers_the_gradients_of_convolutions(batch):
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3, groups=2), nn.Flatten(), nn.Linear(576, 10))
    space = ParameterSpace.of(model)
    batches = [(torch.randn(batch, 8, 7, 7), torch.randint(10, (batch,))) for _ in range(2)]
    objective = Objective(model, Categorical(), batches, space)
    totals = {name: [RunningSum() for _ in range(3)] for name in space.names}
    activations = 4 * batch * 30 * (8 * 9 + 64 * 9) * 25  # patches of all positions, and outputs

    def run():
        for gradients in layer_gradients(objective, "empirical"):
            for name, one in gradients.items():
                one.add_squares(totals[name][0])
                one.add_moments(one.matrices, dict(enumerate(totals[name][1:])))

    sums = 12 * sum(info.size + info.shape[0] ** 2 + (info.size // info.shape[0]) ** 2 for info in space.parameters)
    assert peak(run) <= layer_gradients_memory(space, batch) + sums + activations
