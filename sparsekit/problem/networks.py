"""Checks that a network can be pruned, and context managers that restore its state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod

from sparsekit.errors import ModelError, SparsekitError

#: Examples in a batch that tests whether each is computed independently of the others.
_FEW = 4


# -- kinds ---------------------------------------------------------------------------------------------------
def check_kind(model: nn.Module) -> None:
    """Refuse what is no module, and modules whose parameters cannot be listed or replaced one by one.

    Raises:
        ModelError: there is one; the message says what to give instead.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is of {kind_of(model)}; a torch.nn.Module was needed")
    for name, module in model.named_modules():
        where = f"the module '{name}' ({type(module).__name__})" if name else f"the model, a {type(module).__name__},"
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise ModelError(f"{where} spreads batches over devices, which is not possible here; give its .module")
        if isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None:
            raise ModelError(f"{where} is compiled and cannot be looked into; give the nn.Module that it was made from")
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                raise ModelError(
                    f"{where} was pruned by torch.nn.utils.prune, which computes its '{hook._tensor_name}' anew at "
                    f"each call; make that permanent first: torch.nn.utils.prune.remove(module, '{hook._tensor_name}')"
                )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(f"'{name}' has no shape yet, its module is lazy; run the model on one batch first")


def check_values(model: nn.Module) -> None:
    """Refuse parameters without values, and parameters on several devices.

    Raises:
        ModelError: there are some.
    """
    devices: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        devices.setdefault(parameter.device, name)
    for device, name in devices.items():
        if device.type == "meta":
            raise ModelError(
                f"'{name}' is on the meta device and has no values; load the weights first "
                "(load_state_dict(…, assign=True))"
            )
    if len(devices) > 1:
        raise ModelError(
            f"the model's parameters lie on several devices ({', '.join(map(str, devices))}); move it to one of them"
        )


def refuse_autocast() -> None:
    """Refuse to work inside the caller's autocast, whose cache keeps casts of weights from before a change.

    Raises:
        ModelError: autocast is on.
    """
    if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        raise ModelError(
            "torch.autocast is on, and weights would be read from its cache as they were before a cut; leave its "
            "block, and enter it in the model's own forward where it is wanted"
        )


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turn autocast off inside, and clear its cache of weights; the previous setting is restored on exit."""
    on = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    cached = torch.is_autocast_cache_enabled()
    try:
        for kind in on:
            torch.set_autocast_enabled(kind, False)
        if on:  # casts made by an autocast block in the model's own forward would stay in the cache: it is nested
            torch.set_autocast_cache_enabled(False)
        yield
    finally:
        for kind in on:
            torch.set_autocast_enabled(kind, True)
        torch.set_autocast_cache_enabled(cached)
        if on:
            torch.clear_autocast_cache()


def copied(model: nn.Module) -> nn.Module:
    """A deep copy. Computed tensors that a module stores are copied without their graph.

    Raises:
        ModelError: a part of it cannot be copied.
    """
    plain: Callable[..., Any] = Tensor.__deepcopy__
    held: list[Tensor] = []  # deepcopy identifies originals by id, which must stay in use

    def value(tensor: Tensor, memo: dict[int, object]) -> Tensor:
        if not tensor.is_leaf:
            tensor = tensor.detach()
            held.append(tensor)
        return cast(Tensor, plain(tensor, memo))

    try:
        with mock.patch.object(Tensor, "__deepcopy__", value):
            return deepcopy(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelError(
            f"the model {type(model).__name__} cannot be copied ({error}); prune it in place (inplace=True), without "
            "reconstruction"
        ) from error


# -- as it was found -----------------------------------------------------------------------------------------
@contextmanager
def as_found(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode inside; modes, `requires_grad`, gradients and buffers are restored on exit.

    Per-example gradients are not defined under batch statistics, and with dropout they would be those of another
    function; so curvature is always that of the network in evaluation mode. Outputs that are not tensors are
    refused, see `tensor_outputs`.

    Raises:
        ModelError: autocast is on.
    """
    refuse_autocast()
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        with _buffers_as_found(model), dense_gradients(model), tensor_outputs(model):
            yield model
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextmanager
def _buffers_as_found(model: nn.Module) -> Iterator[None]:
    """Restore the buffers, tensors and values, on exit: a forward pass may count or accumulate in them."""
    found = [
        (module, name, buffer, buffer.clone(), _version(buffer))
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            # changes through `.data` and by some kernels do not raise the version; NaN is not equal to itself
            quiet = [(buffer, value) for _, _, buffer, value, version in found if _version(buffer) == version]
            differs = torch.stack([(a != b).any() for a, b in quiet]).tolist() if quiet else []  # one wait for all
            changed = {id(buffer) for (buffer, _), other in zip(quiet, differs, strict=True) if other}
            for module, name, buffer, value, version in found:
                if _version(buffer) != version or id(buffer) in changed:
                    buffer.copy_(value)
                module._buffers[name] = buffer


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors do not change and have no version


@contextmanager
def dense_gradients(model: nn.Module) -> Iterator[None]:
    """Turn sparse gradients of embeddings off inside: gradient rows and momentum are dense."""
    sparse = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse]
    for module in sparse:
        module.sparse = False
    try:
        yield
    finally:
        for module in sparse:
            module.sparse = True


@contextmanager
def tensor_outputs(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, a call of the model that does not return one tensor raises a ModelError.

    Outputs less precise than the weights, as from autocast in the model's own forward, are converted to the weights'
    type: otherwise losses and their sums would be wrong in the third digit.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    def check(_model: nn.Module, _args: object, output: object) -> Tensor:
        if not isinstance(output, Tensor):
            raise ModelError(
                f"the model {type(model).__name__} returned {kind_of(output)}; one tensor was needed: wrap it in a "
                "module that returns its logits alone"
            )
        narrow = dtype is not None and output.is_floating_point() and output.dtype.itemsize < dtype.itemsize
        return output.to(dtype) if narrow else output

    handle = model.register_forward_hook(check)
    try:
        yield model
    finally:
        handle.remove()


def kind_of(value: object) -> str:
    """The type of a value, for messages."""
    if isinstance(value, tuple | list) and len(value) <= 4:
        return f"{type(value).__name__} ({', '.join(type(part).__name__ for part in value)})"
    return f"type {type(value).__name__}"


# -- examples are computed independently ---------------------------------------------------------------------
@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """The model's outputs, one row for each example.

    Raises:
        ModelError: it fails on the inputs, or returns another number of rows.
    """
    try:
        output: Tensor = model(inputs)
    except (SparsekitError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        dtype = next(model.parameters()).dtype
        given = f"inputs {tuple(inputs.shape)} of {inputs.dtype}"
        advice = (
            f"; its weights are {dtype}: convert the inputs or the model"
            if inputs.is_floating_point() and inputs.dtype != dtype
            else ""
        )
        raise ModelError(f"the model {type(model).__name__} failed on {given}: {error}{advice}") from error
    if not output.dim() or len(output) != len(inputs):
        raise ModelError(
            f"the model {type(model).__name__} returned {tuple(output.shape)} for inputs {tuple(inputs.shape)}; a row "
            "an example was needed: give a model, and data, whose first dimension is that of examples"
        )
    return output


def check_examples_apart(model: nn.Module, inputs: Tensor) -> None:
    """Refuse a model whose output for an example depends on the other examples of its batch or on their number.

    Such a model has no loss, gradient or Fisher information of a single example. An example's output in the batch is
    compared with its output in a batch of its copies: computations of the same sizes round alike in any precision.
    Models that draw random numbers are not checked.

    Args:
        model: within `as_found`.
        inputs: of a batch; nothing is checked for a single example.

    Raises:
        ModelError: the output does, or the model does not take a single example.
    """
    few = inputs[:_FEW]
    if len(few) < 2:
        return
    beside = outputs(model, few)
    for row in (0, len(few) - 1):
        own = outputs(model, few[row : row + 1].expand_as(few).contiguous())
        if _differ(beside[row], own[row], torch.finfo(_floating(own)).eps ** 0.5):
            _refuse(model, few, beside)
    alone = outputs(model, few[:1])
    if _differ(beside[0], alone[0], 0.1):  # other sizes round differently
        _refuse(model, few, beside)


def _refuse(model: nn.Module, few: Tensor, before: Tensor) -> None:
    if _differ(before, outputs(model, few), torch.finfo(_floating(before)).eps ** 0.5):
        return  # it draws random numbers: two calls differ anyway
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is None]
    what = f" ({type(norms[0]).__name__} without running statistics)" if norms else ""
    raise ModelError(
        f"the output of the model {type(model).__name__} for an example depends on the other examples of its "
        f"batch{what}, so it has no loss or gradient of an example; one that treats each example alone in evaluation "
        "mode was needed"
    )


def _floating(output: Tensor) -> torch.dtype:
    return output.dtype if output.is_floating_point() else torch.float64


def _differ(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two outputs differ by more than a relative tolerance."""
    if a.shape != b.shape:
        return True
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return True
    a, b = (t[finite].double() for t in (a, b))
    return bool((a - b).norm() > tolerance * torch.maximum(a.norm(), b.norm()))
