"""Pruning from Python: any module, any iterable of batches, one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsekit.errors import DataError, DegradedWarning, ModelError, SettingsError
from sparsekit.interfaces import ReconstructionSettings, measure
from sparsekit.likelihoods import Likelihood, Loss, as_likelihood
from sparsekit.objective import Batch, Objective, pairs
from sparsekit.parameters import Mask, ParameterSpace
from sparsekit.provenance import available_memory
from sparsekit.pruner import Metrics, Pruner, StepCompleted
from sparsekit.reconstruction import Reconstruction
from sparsekit.run import degradations, load_registry
from sparsekit.schedules import plan
from sparsekit.settings import resolve
from sparsekit.unused import used


@dataclass(frozen=True)
class Pruned:
    """What `prune` returns.

    Attributes:
        model: a plain module with zeros where weights were removed; a copy, unless it was pruned in place.
        mask: name -> bool tensor of the parameter's shape, True = kept.
        sparsity: fraction of the prunable weights removed.
        dense: metrics before.
        steps: one event a cut, with metrics, predicted and measured increase, seconds.
        skipped: name -> why a parameter was not pruned.
        degraded: what went less well, a sentence each: a layer that is gone, a solve that did not converge. Each is
            a `DegradedWarning` too.
    """

    model: nn.Module
    mask: Mapping[str, Tensor]
    sparsity: float
    dense: Metrics
    steps: Sequence[StepCompleted]
    skipped: Mapping[str, str]
    degraded: Sequence[str] = ()


@contextmanager
def _own_precision() -> Iterator[None]:
    """No autocast but what the model does itself: its cache would keep weights that have been changed since."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@_own_precision()
@torch.inference_mode(False)  # gradients are taken here, whatever the caller has switched off
def prune(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    loss: str | Loss | Likelihood,
    sparsity: float = 0.9,
    estimator: str | Mapping[str, Any] = "fishleg",
    saliency: str | Mapping[str, Any] = "obs",
    pattern: str | Mapping[str, Any] = "unstructured",
    schedule: str | Mapping[str, Any] = "one-shot",
    steps: int = 4,
    substeps: int = 1,
    compensation: str | Mapping[str, Any] = "joint",
    reconstruct: str | Mapping[str, Any] = "none",
    finetune: Mapping[str, Any] | None = None,
    evaluation: Iterable[Batch] | Callable[[nn.Module], Metrics] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    seed: int = 0,
    inplace: bool = False,
) -> Pruned:
    """Prune a trained network and move the surviving weights to make up for it.

    Args:
        model: any module from one tensor of inputs to one of outputs, on the CPU or a CUDA device; MPS lacks the
            float64 that sums are taken in.
        data: batches (inputs, targets), pairs of tensors, of training examples; calibration and fine-tuning use them.
        loss: 'categorical', 'bernoulli', 'gaussian', a `Likelihood`, or torch's cross-entropy, negative
            log-likelihood, binary cross-entropy with logits or squared error, with class weights, ignored index and
            label smoothing as they are. Any other callable must be a mean (or sum) over the examples, and has no
            distribution to sample labels from: then give the estimator fisher='empirical'.
        sparsity: fraction of the prunable weights to remove, in [0, 1).
        estimator: a name, or a mapping with `name` and settings: {"name": "fishleg", "examples": 512}.
        saliency: the same.
        pattern: the same.
        schedule: the same.
        steps: cuts with fine-tuning after each; no effect on one-shot.
        substeps: parts of each cut, with the curvature refreshed between them.
        compensation: 'joint', 'independent', 'none' or 'exact', or a mapping with `how` and settings.
        reconstruct: fit layers to the dense network after a cut: 'none', 'layerwise' or 'fisher', or a mapping with
            `how` and settings.
        finetune: settings such as {"epochs": 1, "learning_rate": 0.01}; without it there is none. `batch_size` is not
            among them: the batches are those of `data`.
        evaluation: batches, or model -> metrics; by default the loss and accuracy on `data`.
        include: shell patterns of parameter names to prune; by default what layers multiply with, see
            `ParameterSpace.of`, but for what the loss does not depend on.
        exclude: shell patterns that win over `include`.
        seed: of sampled labels and everything else that is random.
        inplace: prune `model` itself rather than a copy.

    Raises:
        SparsekitError: settings, data or model cannot be used; the message says what to do.
    """
    if "batch_size" in (finetune or {}):
        raise SettingsError(
            "finetune.batch_size has no effect here, fine-tuning takes the batches of data as they are; leave it out "
            "and give data in batches of that size"
        )
    raw: dict[str, Any] = {
        "estimator": estimator,
        "saliency": saliency,
        "pattern": pattern,
        "schedule": schedule,
        "sparsity": [sparsity],
        "steps": steps,
        "substeps": substeps,
        "compensation": compensation,
        "reconstruction": reconstruct,
        "finetune": {"epochs": 0, **(finetune or {})},
        "seed": seed,
    }
    resolved = resolve(raw, load_registry())
    likelihood = as_likelihood(loss)
    _check_supported(model)
    space = ParameterSpace.of(model, include=include, exclude=exclude)
    model = model if inplace else _copied(model)
    device = next(model.parameters()).device
    resolved.classes["estimator"].check(model, space, resolved.options["estimator"], available_memory(device))
    batches: Iterable[Batch] = list(data) if isinstance(data, Iterator) else data
    Objective(model, likelihood, batches, space).check()
    options: Any = resolved.options["estimator"]
    some = _some(batches, options.examples, options.batch_size)
    space, degraded = used(Objective(model, likelihood, some, space), included=include is not None)
    how = resolved.settings.reconstruction
    if how.how != "none":
        Reconstruction.check(model, space, _anchors(batches, how), how, available_memory(device).device)
    judge: Iterable[Batch] | Callable[[nn.Module], Metrics] = batches if evaluation is None else evaluation
    if isinstance(judge, Iterator):
        judge = list(judge)
    pruner = Pruner(
        model=model,
        space=space,
        likelihood=likelihood,
        estimator=resolved.build("estimator", space),
        saliency=resolved.build("saliency"),
        pattern=resolved.build("pattern"),
        compensation=resolved.settings.compensation,
        steps=plan(
            resolved.sparsity,
            resolved.build("schedule"),
            steps=steps,
            substeps=substeps,
            finetune=resolved.finetune.epochs > 0,
        ),
        calibration=lambda generator: _calibration(batches, options),
        reconstruction=how,
        anchors=lambda generator: _anchors(batches, how),
        measure=judge if callable(judge) else (lambda model: measure(model, likelihood, judge)),
        seed=seed,
        finetune_settings=resolved.finetune,
        training=lambda generator: batches,
        training_batches=sum(1 for _ in batches) if resolved.finetune.epochs else 0,
    )
    done = [event for event in pruner.run() if isinstance(event, StepCompleted)]
    mask = pruner.state.mask or Mask.full(space.size, device)
    degraded += [line for event in done for line in degradations(event, pruner.compensation)]
    for line in degraded:
        warnings.warn(line, DegradedWarning, stacklevel=2)
    kept, dense = space.unflatten(mask.kept), pruner.state.dense or {}
    return Pruned(model, kept, mask.sparsity, dense, done, space.skipped, degraded)


def _check_supported(model: nn.Module) -> None:
    """Refuse kinds of modules whose gradients by example cannot be had.

    Raises:
        ModelError: with what to give instead.
    """
    if not any(True for _ in model.parameters()):
        raise ModelError(f"the model {type(model).__name__} has no parameters")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ModelError(f"the model is wrapped in {type(model).__name__}; give the module inside: model.module")
    for name, module in model.named_modules():
        what = f"the layer '{name}'" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"{what} is a ScriptModule, which gives no gradients by example; give the module it is of")
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ModelError(f"{what} normalises by its batch; a batch norm with running statistics was needed")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ModelError(f"{what} has sparse gradients; set its `sparse` to False, which changes no output")
    absent = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
    if absent is not None:
        raise ModelError(f"the parameter '{absent}' is on the meta device and has no values; load the weights first")


def _copied(model: nn.Module) -> nn.Module:
    try:
        return deepcopy(model)
    except RuntimeError as error:
        raise ModelError(
            f"the model {type(model).__name__} cannot be copied ({str(error).splitlines()[0]}): a module keeps a "
            "tensor of an earlier pass; delete it, or give inplace=True"
        ) from None


def _some(batches: Iterable[Batch], examples: int, batch_size: int) -> Iterator[Batch]:
    """The data's batches, cut where they are larger than `batch_size`, until `examples` have come; read as needed."""
    for inputs, targets in pairs(batches):
        yield from zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
        examples -= len(targets)
        if examples <= 0:
            return


def _calibration(batches: Iterable[Batch], options: Any) -> list[Batch]:
    """The estimator's examples; where nobody said how many, as many as there are, up to its default."""
    asked = "examples" in options.model_fields_set
    return _examples(batches, options.examples, options.batch_size, options.fitting, fewer=not asked)


def _anchors(batches: Iterable[Batch], how: ReconstructionSettings) -> list[Batch]:
    return _examples(
        batches,
        how.examples,
        how.batch_size,
        lambda available: available,
        "reconstruction",
        "reconstruct",
        fewer="examples" not in how.model_fields_set,
    )


def _examples(
    batches: Iterable[Batch],
    examples: int,
    batch_size: int,
    fitting: Callable[[int], int],
    what: str = "the estimator",
    argument: str = "estimator",
    *,
    fewer: bool = False,
) -> list[Batch]:
    """The first `examples` of the batches, or `fewer` where they are no more, cut anew into batches of `batch_size`."""
    taken: list[Batch] = []
    count = 0
    for inputs, targets in pairs(batches):
        taken.append((inputs[: examples - count], targets[: examples - count]))
        count += len(taken[-1][1])
        if count == examples:
            break
    if count < examples and not (fewer and count):
        most = fitting(count)
        key = "how" if argument == "reconstruct" else "name"
        raise DataError(
            f"{what} needs {examples} calibration examples, the data has {count}; give more data"
            + (f" or set {argument}={{'{key}': ..., 'examples': {most}}}" if most else "")
        )
    inputs, targets = (torch.cat(parts) for parts in zip(*taken, strict=True))
    return list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))
