"""Pruning from Python: any module, any iterable of batches, one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from sparsekit.errors import DataError, DegradedWarning, SettingsError, SparsekitError
from sparsekit.machine import available_memory
from sparsekit.methods.interfaces import measure
from sparsekit.methods.plain_values import shown
from sparsekit.methods.schedules import plan
from sparsekit.problem.likelihoods import Likelihood, Loss, as_likelihood
from sparsekit.problem.networks import check_kind, copied, without_autocast
from sparsekit.problem.objective import Batch, Objective, pairs
from sparsekit.problem.parameters import ParameterSpace
from sparsekit.problem.unused import used
from sparsekit.pruning.events import Metrics, StepCompleted
from sparsekit.pruning.pruner import Pruner
from sparsekit.reconstruction.fit import Reconstruction
from sparsekit.registry.installed import load_registry
from sparsekit.runs.degraded import degradations, not_reconstructed
from sparsekit.runs.settings import ResolvedRun, resolve

#: Batches of data that have no length: who gives more, gives something with one.
MOST_BATCHES = 10_000


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


# Longer than other functions for the sake of its readers: every argument and what is said of it stand in one place.
@torch.inference_mode(False)  # gradients are taken here, whatever the caller has switched off
@without_autocast()
def prune(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    loss: str | Loss | Likelihood,
    sparsity: float = 0.9,
    estimator: str | Mapping[str, object] = "fishleg",
    saliency: str | Mapping[str, object] | None = None,
    pattern: str | Mapping[str, object] = "unstructured",
    schedule: str | Mapping[str, object] = "one-shot",
    steps: int = 4,
    substeps: int = 1,
    compensation: str | Mapping[str, object] | None = None,
    reconstruct: str | Mapping[str, object] | None = None,
    batch_norm: str | Mapping[str, object] | None = None,
    finetune: Mapping[str, object] | None = None,
    evaluation: Iterable[Batch] | Callable[[nn.Module], Metrics] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    seed: int = 0,
    inplace: bool = False,
) -> Pruned:
    """Prune a trained network and move the surviving weights to make up for it.

    Autocast that is on around the call is off within it; in the model's own `forward` it stays.

    Args:
        model: any module from one tensor of inputs to one of outputs that treats each example alone in evaluation mode,
            on the CPU or a CUDA device; MPS lacks the float64 that sums are taken in. Modules that were put in
            evaluation mode while the model is in training mode stay there in fine-tuning: batch norm keeps its
            statistics. A model in evaluation mode is fine-tuned in training mode throughout.
        data: batches (inputs, targets), pairs of tensors, of training examples; calibration and fine-tuning use them.
            They must end: with a length, or after 10,000 batches at most.
        loss: 'categorical', 'bernoulli', 'gaussian', a `Likelihood`, or torch's cross-entropy, negative
            log-likelihood, binary cross-entropy with logits or squared error, with class weights, ignored index and
            label smoothing as they are. Any other callable must be a mean (or sum) over the examples, and has no
            distribution to sample labels from: then give the estimator fisher='empirical'.
        sparsity: fraction of the prunable weights to remove, in [0, 1).
        estimator: a name, or a mapping with `name` and settings: {"name": "fishleg", "examples": 512}. Without a
            number there are as many calibration examples as the data has, at most 1,024.
        saliency: the same. None, here and below: the estimator's own default (`run_defaults`), what was measured best
            with it; else 'obs', 'joint', 'none' and 'kept'.
        pattern: the same.
        schedule: the same.
        steps: cuts with fine-tuning after each; no effect on one-shot.
        substeps: parts of each cut, with the curvature refreshed between them.
        compensation: 'joint', 'independent', 'none' or 'exact', or a mapping with `how` and settings.
        reconstruct: fit layers to the dense network after a cut: 'none', 'layerwise' or 'fisher', or a mapping with
            `how` and settings.
        batch_norm: statistics after a cut and reconstruction: 'kept', or taken 'anew' from `data`, or a mapping with
            `statistics` and settings.
        finetune: settings such as {"epochs": 1, "learning_rate": 0.01}; without it there is none. `batch_size` is not
            among them: the batches are those of `data`.
        evaluation: batches, or model -> metrics; by default the loss and accuracy on `data`.
        include: names of parameters to prune, or shell patterns of them; by default what layers multiply with, see
            `ParameterSpace.of`, but for what the loss does not depend on.
        exclude: the same, and wins over `include`.
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
    raw: dict[str, object] = {
        "estimator": estimator,
        "pattern": pattern,
        "schedule": schedule,
        "sparsity": [sparsity],
        "steps": steps,
        "substeps": substeps,
        "finetune": {"epochs": 0, **(finetune or {})},
        "seed": seed,
    }
    may_be_defaults = {
        "saliency": saliency,
        "compensation": compensation,
        "reconstruction": reconstruct,
        "batch_norm": batch_norm,
    }
    raw |= {key: value for key, value in may_be_defaults.items() if value is not None}
    resolved = resolve(raw, load_registry())
    likelihood = as_likelihood(loss)
    check_kind(model)
    space = ParameterSpace.of(model, include=include, exclude=exclude)
    model = model if inplace else copied(model)
    batches = _ending(data, "data")
    request = _Request(model, space, likelihood, batches, _fitted(resolved, batches))
    request, degraded = request.checked(included=include is not None)
    if not callable(evaluation):
        measured = batches if evaluation is None else _ending(evaluation, "evaluation")
        evaluation = partial(measure, likelihood=likelihood, batches=measured)
    pruner = request.pruner(partial(_metrics, evaluation))
    done = [event for event in pruner.run() if isinstance(event, StepCompleted)]
    mask, dense = pruner.state.mask, pruner.state.dense
    assert mask is not None and dense is not None
    degraded += [line for event in done for line in degradations(event, pruner.compensation)]
    for line in degraded:
        warnings.warn(line, DegradedWarning, stacklevel=2)
    space = request.space
    return Pruned(model, space.unflatten(mask.kept), mask.sparsity, dense, done, space.skipped, degraded)


@dataclass(frozen=True)
class _Request:
    """What is to be pruned, with what and how."""

    model: nn.Module
    space: ParameterSpace
    likelihood: Likelihood
    batches: Iterable[Batch]
    resolved: ResolvedRun

    def checked(self, *, included: bool) -> tuple[_Request, list[str]]:
        """Refuse what cannot work, by the first batches; the same of what the loss depends on, and what is to be told.

        Args:
            included: whether parameters were chosen by name.
        """
        options, how = self.resolved.estimator.settings, self.resolved.settings.reconstruction
        device = next(self.model.parameters()).device
        self.resolved.estimator.cls.check(self.model, self.space, options, available_memory(device))
        Objective(self.model, self.likelihood, self.batches, self.space).check()
        some = _some(self.batches, options.examples, options.batch_size)
        space, degraded = used(Objective(self.model, self.likelihood, some, self.space), included=included)
        checked = replace(self, space=space)
        if how.how != "none":
            try:
                Reconstruction.check(self.model, space, self.anchors(), how, available_memory(device).device)
            except SparsekitError as error:
                if "reconstruction" not in self.resolved.chosen:
                    raise
                degraded.append(not_reconstructed(error))
                checked = replace(checked, resolved=self.resolved.without_reconstruction())
        return checked, degraded

    def pruner(self, evaluation: Callable[[nn.Module], Metrics]) -> Pruner:
        """The loop over this model, with everything built."""
        resolved, settings = self.resolved, self.resolved.settings
        schedule, tuned = resolved.schedule.build(), resolved.finetune.epochs > 0
        return Pruner(
            model=self.model,
            space=self.space,
            likelihood=self.likelihood,
            estimator=resolved.estimator.build(self.space),
            saliency=resolved.saliency.build(),
            pattern=resolved.pattern.build(),
            compensation=settings.compensation,
            steps=plan(resolved.sparsity, schedule, steps=settings.steps, substeps=settings.substeps, finetune=tuned),
            calibration=lambda generator: self.calibration(),
            reconstruction=settings.reconstruction,
            anchors=lambda generator: self.anchors(),
            batch_norm=settings.batch_norm,
            norm_examples=lambda generator: self.norm_examples(),
            measure=evaluation,
            seed=settings.seed,
            finetune_settings=resolved.finetune,
            training=lambda generator: self.batches,
            training_batches=sum(1 for _ in self.batches) if tuned else 0,
        )

    def calibration(self) -> list[Batch]:
        options = self.resolved.estimator.settings
        return _examples(self.batches, options.examples, options.batch_size, options.fitting)

    def anchors(self) -> list[Batch]:
        how, what = self.resolved.settings.reconstruction, ("reconstruction", "reconstruct")
        return _examples(self.batches, how.examples, how.batch_size, lambda available: available, *what)

    def norm_examples(self) -> list[Batch]:
        how, what = self.resolved.settings.batch_norm, ("batch normalisation", "batch_norm")
        return _examples(self.batches, how.examples, how.batch_size, lambda available: available, *what)


def _metrics(evaluation: Callable[[nn.Module], Metrics], model: nn.Module) -> Metrics:
    """What `evaluation` measures of the model.

    Raises:
        DataError: it is no mapping from names to numbers.
    """
    found = evaluation(model)
    try:
        return {str(name): float(value) for name, value in found.items()}
    except (AttributeError, TypeError, ValueError):
        given = shown(found)
        raise DataError(f"`evaluation` returned {given}; numbers by name were needed: {{'accuracy': 0.9}}") from None


def _some(batches: Iterable[Batch], examples: int, batch_size: int) -> Iterator[Batch]:
    """The data's batches, cut where they are larger than `batch_size`, until `examples` have come; read as needed."""
    for inputs, targets in pairs(batches):
        yield from zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
        examples -= len(targets)
        if examples <= 0:
            return


def _ending(batches: Iterable[Batch], name: str) -> Iterable[Batch]:
    """The batches, which can be gone over again and come to an end: an iterator's are held.

    Args:
        batches: any.
        name: of the argument.

    Raises:
        DataError: an iterator gives more than MOST_BATCHES, or than half of the memory.
    """
    if not isinstance(batches, Iterator):
        try:
            len(batches)  # type: ignore[arg-type]
        except TypeError:
            return _Bounded(batches, name)
        return batches
    held: list[Batch] = []
    size, memory = 0, available_memory(torch.device("cpu")).host // 2
    for batch in pairs(_Bounded(batches, name)):
        held.append(batch)
        size += sum(part.nbytes for part in batch)
        if size > memory:
            raise DataError(
                f"`{name}` is an iterator, whose batches are held to be gone over again, and gave {len(held):,} of "
                f"them, {size / 2**20:,.0f} MiB, without coming to an end; give a DataLoader, or the first so many: "
                "list(itertools.islice(data, 100))"
            )
    return held


class _Bounded:
    """Batches without a length, up to MOST_BATCHES of them."""

    def __init__(self, batches: Iterable[Batch], name: str) -> None:
        self._batches, self._name = batches, name

    def __iter__(self) -> Iterator[Batch]:
        for count, batch in enumerate(self._batches):
            if count == MOST_BATCHES:
                raise DataError(
                    f"`{self._name}` has no length and gave {MOST_BATCHES:,} batches without coming to an end; take "
                    "the first so many, list(itertools.islice(data, 100)), or give it a length (__len__)"
                )
            yield batch


def _fitted(resolved: ResolvedRun, batches: Iterable[Batch]) -> ResolvedRun:
    """The run with as many examples as there are where nobody set a number."""
    given = resolved.estimator.settings
    most = 0 if "examples" in resolved.settings.estimator else given.examples
    for part in resolved.settings.users_of_examples.values():
        most = max(most, 0 if "examples" in part.model_fields_set else part.examples)
    if not most:
        return resolved
    count = 0
    for _, targets in pairs(batches):
        count += len(targets)
        if count >= most:
            break
    return resolved.fitted(count)


def _examples(
    batches: Iterable[Batch],
    examples: int,
    batch_size: int,
    fitting: Callable[[int], int],
    what: str = "the estimator",
    argument: str = "estimator",
) -> list[Batch]:
    """The first `examples` of the batches, cut anew into batches of `batch_size`."""
    taken: list[Batch] = []
    count = 0
    if not examples:
        return taken
    for inputs, targets in pairs(batches):
        taken.append((inputs[: examples - count], targets[: examples - count]))
        count += len(taken[-1][1])
        if count == examples:
            break
    if count < examples:
        most = fitting(count)
        key = {"reconstruct": "how", "batch_norm": "statistics"}.get(argument, "name")
        raise DataError(
            f"{what} needs {examples} calibration examples, the data has {count}; give more data"
            + (f" or set {argument}={{'{key}': ..., 'examples': {most}}}" if most else "")
        )
    inputs, targets = (torch.cat(parts) for parts in zip(*taken, strict=True))
    return list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))
