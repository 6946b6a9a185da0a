"""Conformance of tasks; see `checks` for how the results are used with pytest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from sparsekit.methods.interfaces import Split, Task
from sparsekit.testing.component_checks import Checks, _but

SPLITS: tuple[Split, ...] = get_args(Split)


def task_checks(
    make: Callable[[], Task],
    *,
    other: Callable[[], Task] | None = None,
    waived: Mapping[str, str] | None = None,
) -> Checks:
    """Every check of a task.

    Args:
        make: () -> the task, on small data: all of it is read several times, and its network trained if it has none.
        other: () -> the same task on other data, whose fingerprint must differ; None: there is none.
        waived: name of a check -> why it cannot pass.
    """
    checks: dict[str, Callable[[], None]] = {
        "sizes": partial(_sizes, make),
        "order": partial(_order, make),
        "draws": partial(_draws, make),
        "limit": partial(_limit, make),
        "disjoint_splits": partial(_disjoint_splits, make),
        "model": partial(_model, make),
        "measure": partial(_measure, make),
        "fingerprint": partial(_fingerprint, make, other),
    }
    return _but(checks, waived)


def _all(task: Task, split: Split, batch_size: int = 50) -> tuple[Tensor, Tensor]:
    batches = list(task.batches(split, batch_size=batch_size))
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([targets for _, targets in batches])


def _sizes(make: Callable[[], Task]) -> None:
    task = make()
    for split in SPLITS:
        count = len(_all(task, split)[0])
        if count != task.size(split) or not count:
            raise AssertionError(f"size('{split}') is {task.size(split)}, its batches have {count} examples")


def _order(make: Callable[[], Task]) -> None:
    task = make()
    for split in SPLITS:
        (first, labels), (second, others) = _all(task, split, 50), _all(task, split, 7)
        if not (torch.equal(first, second) and torch.equal(labels, others)):
            raise AssertionError(f"without a generator '{split}' has another order in batches of 7 than in those of 50")


def _draws(make: Callable[[], Task]) -> None:
    task = make()

    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        batches = task.batches("train", batch_size=16, limit=32, generator=generator)
        return torch.cat([inputs for inputs, _ in batches])

    torch.manual_seed(1)
    first = drawn(0)
    torch.manual_seed(2)
    if not torch.equal(first, drawn(0)):
        raise AssertionError("the same generator seed draws other examples: draw from `generator` alone")
    if task.size("train") > 40 and torch.equal(first, drawn(1)):
        raise AssertionError("two generator seeds draw the same examples: a subset, and its order, are to be random")


def _limit(make: Callable[[], Task]) -> None:
    task = make()
    wanted = min(10, task.size("train"))
    sizes = [len(inputs) for inputs, _ in task.batches("train", batch_size=4, limit=wanted)]
    if sum(sizes) != wanted or max(sizes) > 4:
        raise AssertionError(f"limit={wanted} in batches of 4 gave batches of {sizes}")


def _disjoint_splits(make: Callable[[], Task]) -> None:
    task = make()
    seen: dict[str, Split] = {}
    for split in SPLITS:
        for one in _all(task, split)[0]:
            digest = hashlib.sha256(one.contiguous().numpy().tobytes()).hexdigest()
            if seen.setdefault(digest, split) != split:
                raise AssertionError(
                    f"an example is in '{seen[digest]}' and in '{split}': settings would be chosen on what is reported"
                )


def _model(make: Callable[[], Task]) -> None:
    task = make()
    first, second = task.model(), task.model()
    if first is second:
        raise AssertionError("model() gave the same object twice; runs change it, so each is to have a new one")
    if first.training or next(first.parameters()).device.type != "cpu":
        raise AssertionError("model() is to be on the CPU, in evaluation mode")
    states = [network.state_dict() for network in (first, second, task.network())]
    if any(not torch.equal(states[0][name], states[1][name]) for name in states[0]):
        raise AssertionError("model() gave other weights the second time")
    if {n: t.shape for n, t in states[0].items()} != {n: t.shape for n, t in states[2].items()}:
        raise AssertionError("network() is another architecture than model()")


def _measure(make: Callable[[], Task]) -> None:
    task = make()
    model = task.model()
    found = task.measure(model, "tuning")
    if "loss" not in found:
        raise AssertionError(f"measure() gives {', '.join(found)}; 'loss' is needed")
    inputs, targets = _all(task, "tuning")
    with torch.no_grad():
        losses = task.likelihood.losses(model(inputs), targets).double()
    if abs(found["loss"] - float(losses.mean())) > 1e-4 * max(1.0, abs(found["loss"])):
        raise AssertionError(
            f"measure() gives the loss {found['loss']:.6g}; the likelihood's, all examples in one batch, is "
            f"{float(losses.mean()):.6g}: a mean of means of unequal batches? another loss than `likelihood`?"
        )


def _fingerprint(make: Callable[[], Task], other: Callable[[], Task] | None) -> None:
    if make().fingerprint() != make().fingerprint():
        raise AssertionError("two tasks on the same data have different fingerprints")
    if other is not None and make().fingerprint() == other().fingerprint():
        raise AssertionError("other data has the same fingerprint: runs on it would be taken for finished")
