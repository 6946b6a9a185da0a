"""Groups of neighbouring weights in a tensor, for patterns that remove weights in groups."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sparsekit.problem.parameters import ParameterInfo, ParameterSpace

Axis = Literal["inputs", "memory"]


def groups_of(space: ParameterSpace, size: int, axis: Axis = "inputs") -> Tensor:
    """(m, size): the whole groups of `size` neighbours along an axis of each tensor, tensor by tensor.

    The remainder at the end of a line is in no group.

    Args:
        space: the tensors.
        size: weights in a group.
        axis: `inputs`: inputs of one output at one place of the kernel, see `inputs_of_outputs`; `memory`: in memory
            order, within one index of the first dimension.
    """
    groups = []
    for info in space.parameters:
        flat = torch.arange(info.start, info.start + info.size)
        lines = inputs_of_outputs(flat, info) if axis == "inputs" else flat.view((info.shape or (1,))[0], -1)
        whole = lines.shape[1] // size * size
        groups.append(lines[:, :whole].reshape(-1, size))
    return torch.cat(groups)


def inputs_of_outputs(flat: Tensor, info: ParameterInfo) -> Tensor:
    """A tensor's entries, (n,) in memory order, as lines (n / inputs, inputs) that an output sums over.

    A line has the input channels of one output at one place of the kernel. It depends on the tensor's layer:

    - linear maps (out, in), among them the projections of attention and the gates of recurrent layers;
    - convolutions (out, in/groups, *kernel), so that a depthwise one has lines of one input;
    - transposed convolutions (in, out/groups, *kernel);
    - transformers' Conv1D (in, out), recognised by its name;
    - an embedding (entries, width): a look-up sums nothing, so a line is an entry's vector; where the table is also
      the last linear map, these are the inputs of an output;
    - bilinear maps (out, in₁, in₂): in₁ for each in₂; tensors of any other module as those of a convolution;
    - a tensor of one dimension has lines of one entry.
    """
    if len(info.shape) < 2:
        return flat.view(-1, 1)  # nothing is summed over
    shape = info.shape
    kind = info.layer or nn.Module
    if issubclass(kind, nn.modules.conv._ConvTransposeNd):
        inputs, outputs, *kernel = shape
        lines = flat.view(info.groups, inputs // info.groups, outputs, *kernel).movedim(1, -1)
    elif any(base.__name__ == "Conv1D" for base in kind.__mro__):
        lines = flat.view(shape).movedim(0, -1)
    else:
        lines = flat.view(shape).movedim(1, -1)
    return lines.reshape(-1, lines.shape[-1])
