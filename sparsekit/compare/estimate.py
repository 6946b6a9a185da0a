"""An estimate of a run's time from its passes through the network, without factorisations and solves."""

from __future__ import annotations

import time

from sparsekit.machine import find_device, wait_for
from sparsekit.runs.preview import planned
from sparsekit.runs.settings import ResolvedRun

# In units of a forward and backward pass of one example.
_FORWARD = 1 / 3
_ROWS = 2.0  # the gradient row of an example
_FIT = 5.0  # reconstruction, for each anchor and cut


def passes(resolved: ResolvedRun, *, shared: bool = False) -> float:
    """Number of forward and backward passes of one example in a run; `shared`: another run makes its first estimate."""
    task = resolved.task.build()
    resolved = resolved.fitted(task.size("train"))
    given = resolved.estimator.settings
    fitting, recipe = resolved.settings.reconstruction, resolved.finetune
    steps = planned(resolved)
    judged = _FORWARD * task.size(resolved.settings.split)
    total = judged
    for step in steps:
        rows = _ROWS * (step.refresh and not (shared and step.index == 0))
        total += given.examples * (rows + 2 * _FORWARD)  # the loss before and after the cut
        if fitting.how != "none" and (fitting.when == "cut" or step.completes_level):
            total += _FIT * fitting.examples + _FORWARD * given.examples
        total += judged * (step.completes_level or step.finetune)
        if step.finetune:
            total += recipe.epochs * task.size("train") + judged
    return total


def seconds_of_an_example(resolved: ResolvedRun, batch_size: int = 64) -> float:
    """Seconds that a forward and backward pass of one example takes, measured on the untrained network."""
    task = resolved.task.build()
    device = find_device(resolved.settings.device)
    model = task.network().to(device)
    inputs, targets = next(iter(task.batches("train", batch_size=batch_size, limit=batch_size)))
    inputs, targets = inputs.to(device), targets.to(device)
    best = float("inf")
    for _ in range(3):  # the first one allocates
        started = time.perf_counter()
        task.likelihood.losses(model(inputs), targets).mean().backward()
        wait_for(device)
        best = min(best, time.perf_counter() - started)
    return best / len(inputs)
