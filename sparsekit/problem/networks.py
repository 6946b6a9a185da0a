"""What a network must be to be worked on, and how it is left: as it was found."""

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

#: Examples that are looked at together to see whether they are computed apart.
_FEW = 4


# -- kinds ---------------------------------------------------------------------------------------------------
def check_kind(model: nn.Module) -> None:
    """Refuse modules whose parameters cannot be told apart or put in place one by one.

    Raises:
        ModelError: with what to give instead.
    """
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
    """Refuse parameters without values, and such as lie on several devices.

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
    """Refuse to work within somebody else's autocast, whose cache keeps casts of weights that have changed since.

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
    """Autocast that is on outside is off inside; what it has cached of weights is forgotten."""
    on = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    cached = torch.is_autocast_cache_enabled()
    try:
        for kind in on:
            torch.set_autocast_enabled(kind, False)
        if on:  # a block in the model's own forward would be nested, and its casts outlive it
            torch.set_autocast_cache_enabled(False)
        yield
    finally:
        for kind in on:
            torch.set_autocast_enabled(kind, True)
        torch.set_autocast_cache_enabled(cached)
        if on:
            torch.clear_autocast_cache()


def copied(model: nn.Module) -> nn.Module:
    """A deep copy. Of computed tensors that a module keeps it has the values, not the graph.

    Raises:
        ModelError: something in it cannot be copied.
    """
    plain: Callable[..., Any] = Tensor.__deepcopy__
    held: list[Tensor] = []  # copies are remembered by the id of what was copied, which must not be given anew

    def value(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
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
    """Evaluation mode inside; modes, `requires_grad`, gradients and buffers as they were found afterwards.

    Per-example gradients are not defined under batch statistics, and dropout would make them another
    function's; so curvature is always that of the network in evaluation mode. Outputs that are not tensors are
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
    """A forward pass may count or accumulate in buffers: afterwards they are the tensors they were, with the values."""
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
            for module, name, buffer, value, version in found:
                # `.data` and some kernels change a tensor without its being counted; NaN is unequal to itself
                if _version(buffer) != version or not torch.equal(buffer, value):
                    buffer.copy_(value)
                module._buffers[name] = buffer


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # which cannot change, and does not count


@contextmanager
def dense_gradients(model: nn.Module) -> Iterator[None]:
    """Embeddings that ask for sparse gradients have dense ones inside: rows and momentum are dense here."""
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
    """Inside, a call of the model that does not return one tensor is a ModelError.

    Outputs less precise than the weights, as autocast in the model's own forward makes them, are widened to the
    weights' type: losses and their sums would be wrong in the third digit otherwise.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    def check(_model: nn.Module, _args: Any, output: object) -> Tensor:
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
    """What was given, in words."""
    if isinstance(value, tuple | list) and len(value) <= 4:
        return f"{type(value).__name__} ({', '.join(type(part).__name__ for part in value)})"
    return f"type {type(value).__name__}"


# -- a function of each example ------------------------------------------------------------------------------
@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """The model's outputs, a row an example.

    Raises:
        ModelError: it fails on them, or returns another number of rows.
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
    """Refuse a model whose output for an example depends on the others of its batch, or on how many there are.

    Losses, gradients and Fisher information of single examples mean nothing then. An example's output is compared
    with that beside copies of itself: the same work of the same sizes, so that rounding is the same in whatever
    precision. Models that draw at random are not judged.

    Args:
        model: within `as_found`.
        inputs: of a batch; a single example tells nothing.

    Raises:
        ModelError: it does, or it does not take a single example.
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
    if _differ(beside[0], alone[0], 0.1):  # of other sizes, and so rounded otherwise
        _refuse(model, few, beside)


def _refuse(model: nn.Module, few: Tensor, before: Tensor) -> None:
    if _differ(before, outputs(model, few), torch.finfo(_floating(before)).eps ** 0.5):
        return  # it draws at random: no two calls agree
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
    """Whether two outputs are not the same, up to a relative difference."""
    if a.shape != b.shape:
        return True
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return True
    a, b = (t[finite].double() for t in (a, b))
    return bool((a - b).norm() > tolerance * torch.maximum(a.norm(), b.norm()))
