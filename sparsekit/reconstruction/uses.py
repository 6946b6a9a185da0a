"""The uses of weights in linear maps and convolutions, recorded while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, NamedTuple, TypeGuard
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsekit.problem.parameters import ParameterSpace


class Piece(NamedTuple):
    """Rows of a parameter: all of them, or those in one use of a packed parameter.

    Attributes:
        name: of the parameter.
        start, stop: rows, in its first dimension.
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Call:
    """One use of a weight W (out, in/g, *kernel) in g groups: outputs W x + bias at every position.

    Attributes:
        weight: the rows of a parameter of the space.
        bias: the rows of the model's parameter; None without a bias, or where it is not a parameter of the model.
        offset: the bias itself, (out,), detached; None without a bias.
        groups: g.
        input: detached.
        kernel, stride, padding, dilation: of a convolution, by axis; empty for a linear map.
    """

    weight: Piece
    bias: Piece | None
    offset: Tensor | None = field(repr=False)
    groups: int
    input: Tensor = field(repr=False)
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @cached_property
    def extent(self) -> tuple[int, ...]:
        """Output positions along each axis of a convolution; empty for a linear map, whose inputs are positions."""
        sizes = zip(self.input.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes) if self.kernel else ()

    @property
    def width(self) -> int:
        """Inputs of a row of the weight, in/g · kernel."""
        return self.input.shape[1] // self.groups * prod(self.kernel) if self.kernel else self.input.shape[-1]

    def rows(self, most: int | None, examples: int) -> int:
        """The number of rows of `inputs` at the positions that `positions` draws."""
        if self.kernel:
            count = prod(self.extent)
            return len(self.input) * (count if most is None else min(count, most))
        count = self.input.shape[:-1].numel()
        return count if most is None else min(count, most * examples)

    def positions(self, most: int | None, examples: int, generator: torch.Generator) -> Tensor | None:
        """Positions drawn without replacement; None for all.

        For a convolution (b, ·), indices into the flattened extent, drawn separately for each example. For a linear map
        (·,), indices into its flattened inputs, over all examples.

        Args:
            most: largest number for each example.
            examples: number in the batch.
            generator: a CPU generator.
        """
        here = self.input.device
        if not self.kernel:
            count, wanted = self.input.shape[:-1].numel(), self.rows(most, examples)
            return None if wanted == count else torch.randperm(count, generator=generator)[:wanted].to(here)
        count = prod(self.extent)
        if most is None or most >= count:
            return None
        return torch.rand(len(self.input), count, generator=generator).topk(most, dim=1).indices.to(here)

    def inputs(self, positions: Tensor | None = None) -> Tensor:
        """The inputs that the weight multiplies, (g, rows, in/g · kernel); rows are examples times positions."""
        a = self.input
        if not self.kernel:
            X = a.reshape(-1, a.shape[-1])
            return (X if positions is None else X[positions])[None]
        if len(self.kernel) == 1:  # as images of one row
            image, axes = (
                a.unsqueeze(2),
                [(1, *self.kernel), (1, *self.stride), (0, *self.padding), (1, *self.dilation)],
            )
            rows, columns = 1, self.extent[0]
        else:
            image, (rows, columns) = a, self.extent
            axes = [self.kernel, self.stride, self.padding, self.dilation]
        kernel, stride, padding, dilation = axes
        if positions is None:
            positions = torch.arange(rows * columns, device=a.device).expand(len(a), -1)
        image = F.pad(image, (padding[1], padding[1], padding[0], padding[0])).movedim(1, -1).contiguous()
        offsets = [torch.arange(k, device=a.device) * d for k, d in zip(kernel, dilation, strict=True)]
        y = (positions // columns * stride[0])[..., None, None] + offsets[0][:, None]
        x = (positions % columns * stride[1])[..., None, None] + offsets[1]
        example = torch.arange(len(a), device=a.device).view(-1, 1, 1, 1)
        patches = image[example, y, x]  # (b, T, k, k, channels)
        patches = patches.flatten(0, 1).flatten(1, 2).mT  # (rows, channels, k·k)
        return patches.reshape(len(patches), self.groups, -1).transpose(0, 1)

    def outputs(self, z: Tensor, positions: Tensor | None = None) -> Tensor:
        """The output z at the same positions, (g, rows, out/g)."""
        if not self.kernel:
            Z = z.reshape(-1, z.shape[-1])
            return (Z if positions is None else Z[positions])[None]
        Z = (z if z.dim() > len(self.kernel) + 1 else z[None]).flatten(2)  # z of a single example has no batch
        if positions is not None:
            Z = Z.gather(2, positions[:, None].expand(-1, Z.shape[1], -1))
        return Z.mT.reshape(-1, self.groups, Z.shape[1] // self.groups).transpose(0, 1)


#: A replacement for a call: takes the call and the function that computes it.
Seen = Callable[[Call, Callable[[], Tensor]], Tensor]


class Norm(NamedTuple):
    """A batch normalisation with fixed statistics: z ↦ scale (z − mean) + bias, by channel.

    Attributes:
        name: of the bias, a parameter of the model.
        mean, scale, bias: (channels,), their present values.
    """

    name: str
    mean: Tensor
    scale: Tensor
    bias: Tensor


class WeightCalls(TorchFunctionMode):
    """While it is entered, `seen(call, compute)` replaces every call with a weight of the space.

    Functions are intercepted, not modules, so that all uses of weights are found: in several places, outside of their
    module, or in parts, as attention uses packed projections.

    Attributes:
        seen: returns the call's output, which `compute()` computes.
        normed: called with a call and the batch normalisation of its output, where that comes next.
        others: name of a weight -> another function that uses it, such as a lookup or a product with its transpose.

    Args:
        model: the owner of the biases.
        space: the weights.
        seen: see above.
    """

    def __init__(self, model: nn.Module, space: ParameterSpace, seen: Seen = lambda call, compute: compute()) -> None:
        super().__init__()
        self._weights = _by_storage(space.tensors(model))
        self._biases = _by_storage({name: p for name, p in model.named_parameters() if p.dim() == 1})
        self.others: dict[str, str] = {}
        self.seen = seen
        self.normed: Callable[[Call, Norm], None] = lambda call, norm: None
        self._last: tuple[Call | None, Tensor | None] = None, None

    def __exit__(self, *given: object) -> None:
        self._last = None, None
        super().__exit__(*given)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        given = dict(kwargs or {})
        if func is F.multi_head_attention_forward:
            # It calls linear maps itself; if `has_torch_function` were true, it would be dispatched here again.
            with self, mock.patch.object(F, "has_torch_function", lambda tensors: False):
                return func(*args, **given)
        if func is F.batch_norm:
            self._norm(*args, **given)
        call = self._call(func, *args, **given) if func in _AXES else None
        output = func(*args, **given) if call is None else self.seen(call, lambda: func(*args, **given))
        if func in _AXES:
            self._last = call, output
        if call is None:
            self._note_others(func, output, (*args, *given.values()))
        return output

    def _note_others(self, func: object, output: object, given: tuple[object, ...]) -> None:
        made = [part for part in (output if isinstance(output, tuple | list) else [output]) if _floating(part)]
        for tensor in given:
            name, weight = self._weights.get(_storage(tensor), ("", None))
            # views of the weight are not results computed from it
            if weight is not None and any(_storage(part) != _storage(weight) for part in made):
                self.others[name] = getattr(func, "__name__", str(func))

    def _norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        call, output = self._last
        if call is None or input is not output or training or running_mean is None or running_var is None:
            return
        piece = None if bias is None else _piece(bias, self._biases)
        if bias is not None and piece is not None:
            scale = (running_var + eps).rsqrt() * (1 if weight is None else weight.detach())
            self.normed(call, Norm(piece.name, running_mean.clone(), scale, bias.detach().clone()))

    def _call(
        self,
        func: object,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Call | None:
        piece, axes = _piece(weight, self._weights), _AXES[func]
        if piece is None:
            return None
        of, offset = (None, None) if bias is None else (_piece(bias, self._biases), bias.detach())
        a = input.detach()
        if not axes:
            return Call(piece, of, offset, 1, a)
        kernel, stride, dilation = tuple(weight.shape[2:]), _by_axis(stride, axes), _by_axis(dilation, axes)
        if isinstance(padding, str):  # 'same' pads one more on the right if the total is odd
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
            a = F.pad(a, [side for t in reversed(total) for side in (t // 2, t - t // 2)])
            padding = 0
        if a.dim() == axes + 1:  # a single example
            a = a[None]
        return Call(piece, of, offset, groups, a, kernel, stride, _by_axis(padding, axes), dilation)


#: Intercepted function -> number of axes of its kernel.
_AXES: dict[object, int] = {F.linear: 0, F.conv1d: 1, F.conv2d: 2}


def _by_axis(given: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (given,) * axes if isinstance(given, int) else tuple(given) * (axes if len(given) == 1 else 1)


def _floating(given: object) -> TypeGuard[Tensor]:
    return isinstance(given, Tensor) and given.is_floating_point()


def _storage(given: object) -> int | None:
    """The address of a tensor's memory, the same for all its views; None without one."""
    if not isinstance(given, Tensor) or given.layout != torch.strided:
        return None
    return given.untyped_storage().data_ptr() or None


def _by_storage(tensors: Mapping[str, Tensor]) -> dict[int | None, tuple[str, Tensor]]:
    return {_storage(tensor): (name, tensor) for name, tensor in tensors.items() if _storage(tensor) is not None}


def _piece(tensor: Tensor, known: Mapping[int | None, tuple[str, Tensor]]) -> Piece | None:
    """The rows of a known parameter that a tensor is a view of; None where it is not such a view."""
    name, base = known.get(_storage(tensor), ("", None))
    if base is None or tensor.shape[1:] != base.shape[1:] or not tensor.is_contiguous() or not len(tensor):
        return None
    start = int(tensor.storage_offset() - base.storage_offset()) // base[0].numel()
    return Piece(name, start, start + len(tensor))
