"""Second moments of layers' inputs, the Hessian of layer-wise least squares."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparsekit.curvature.hooked_layers import HookedLayer, hooked_layers, record_uses
from sparsekit.curvature.layer_rules import input_patches
from sparsekit.errors import ModelError
from sparsekit.problem.objective import Objective, as_found, some
from sparsekit.problem.parameters import ParameterSpace

#: Positions from which on an example is multiplied by itself; joining several costs a copy.
POSITIONS = 256

#: Bytes of unfolded inputs that products are taken of at a time.
PATCH_BYTES = 1 << 24


def layer_groups(model: nn.Module, space: ParameterSpace) -> dict[str, int]:
    """Name of each prunable weight -> groups of its layer, a Linear or a convolution.

    Raises:
        ModelError: a prunable parameter is not the weight of such a layer.
    """
    found = {str(layer.weight): int(getattr(layer.module, "groups", 1)) for layer in _matrices(model, space)}
    others = [name for name in space.names if name not in found]
    if others:
        end = "belongs to none: exclude it" if len(others) == 1 else "belong to none: exclude them"
        raise ModelError(
            f"layer-wise least squares needs weights of Linear, Conv1d or Conv2d layers; {', '.join(others)} {end}"
        )
    return {name: found[name] for name in space.names}


def _matrices(model: nn.Module, space: ParameterSpace) -> list[HookedLayer]:
    kinds = nn.Linear, nn.Conv1d, nn.Conv2d
    return [x for x in hooked_layers(model, space) if x.weight is not None and isinstance(x.module, kinds)]


def input_moments(objective: Objective) -> dict[str, Tensor]:
    """E Σ_t x xᵀ over examples, x the inputs that a weight sees at position t: name -> (groups, in, in), float64.

    Products are taken in float64, for so many examples at a time that their patches take PATCH_BYTES. The inputs of
    all uses of a layer count. No gradient is taken.

    Raises:
        ModelError: as `layer_groups`, or a layer never ran.
    """
    layer_groups(objective.model, objective.space)
    layers = _matrices(objective.model, objective.space)
    totals: dict[str, Tensor] = {}
    with as_found(objective.model), torch.no_grad():
        for inputs, _ in objective.on_device():
            with record_uses(layers):
                objective.model(inputs)
            for layer in layers:
                assert layer.weight is not None
                for a, _ in layer.uses:
                    for part in a.split(_fitting(layer.module, a)):
                        for X in _columns(layer.module, part.double()):
                            moment = totals.get(layer.weight)
                            totals[layer.weight] = X @ X.mT if moment is None else moment.baddbmm_(X, X.mT)
    count = some(objective.count())
    idle = [name for name in objective.space.names if name not in totals]
    if idle:
        raise ModelError(f"the layers of {', '.join(idle)} never ran on the data: exclude these parameters")
    return {name: totals[name].div_(count) for name in objective.space.names}


def _fitting(module: nn.Module, a: Tensor) -> int:
    """How many examples of the inputs a (b, …) have patches of PATCH_BYTES in float64, at least one."""
    copies = math.prod(module.kernel_size) if isinstance(module, nn.Conv1d | nn.Conv2d) else 1
    return max(1, PATCH_BYTES // max(1, 8 * copies * a[0].numel()))


def _columns(module: nn.Module, a: Tensor) -> Iterator[Tensor]:
    """The inputs of a weight, (groups, in, ·), in pieces over all examples and positions."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        yield a.reshape(1, -1, a.shape[-1]).mT
        return
    X = input_patches(module, a)  # (b, in·k, T)
    X = X.view(len(a), module.groups, -1, X.shape[-1])
    if X.shape[-1] >= POSITIONS:
        yield from X
    else:
        yield X.movedim(0, 2).flatten(2)  # (g, in/g·k, b·T)


def input_moments_memory() -> int:
    """Bytes of the temporaries of `input_moments`: up to three copies of unfolded inputs at a time."""
    return 3 * PATCH_BYTES
