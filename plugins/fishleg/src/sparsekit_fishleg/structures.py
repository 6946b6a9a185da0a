"""The arrays, with one factor of Q for each mode, that a tensor is viewed as, by the kind of layer.

A layer of your own is taught in a few lines, before the estimator is made:

    from sparsekit_fishleg import View, structure_of

    @structure_of(LocallyConnected)  # its weight: (positions, out, in)
    def locally_connected(info):
        positions, rows, columns = info.shape
        return View(positions, (rows, columns))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import nn

from sparsekit import ParameterInfo, SettingsError

Structure = Literal["eigenbasis", "kronecker", "outer", "frozen", "three-factor", "blocks", "dense", "diagonal"]


@dataclass(frozen=True)
class View:
    """A tensor viewed as `groups` independent arrays, with a factor of Q for each mode.

    Attributes:
        groups: how many arrays the tensor is cut into, in row-major order.
        modes: the shape of each; groups times their product is the tensor's size.
        factored: for each mode, whether it has a factor; one without is taken coordinate by coordinate. By default
            all have.
    """

    groups: int
    modes: tuple[int, ...]
    factored: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if not self.factored:
            object.__setattr__(self, "factored", (True,) * len(self.modes))
        if len(self.factored) != len(self.modes) or self.groups < 1 or min(self.modes, default=0) < 1:
            raise ValueError(f"a view needs a group and a mode at least, and one flag for each mode: {self}")

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.groups * prod(self.modes)

    def __str__(self) -> str:
        parts = " ⊗ ".join(
            f"{d}" if known else f"diagonal {d}" for d, known in zip(self.modes, self.factored, strict=True)
        )
        return parts if self.groups == 1 else f"{self.groups} × ({parts})"


_RULES: dict[type[nn.Module], Callable[[ParameterInfo], View | None]] = {}


def structure_of(
    *layers: type[nn.Module],
) -> Callable[[Callable[[ParameterInfo], View | None]], Callable[[ParameterInfo], View | None]]:
    """Register the rule for parameters of layers of these types (not of types derived from them).

    The rule is given a parameter of two dimensions or more and returns its view, or None for a diagonal.
    """

    def register(rule: Callable[[ParameterInfo], View | None]) -> Callable[[ParameterInfo], View | None]:
        for layer in layers:
            _RULES[layer] = rule
        return rule

    return register


@structure_of(nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _outputs_by_inputs(info: ParameterInfo) -> View:
    """W (out, in·k), group by group; a depthwise channel is one vector of its kernel."""
    return View(info.groups, (info.shape[0] // info.groups, prod(info.shape[1:])))


@structure_of(nn.Embedding)
def _tokens_by_features(info: ParameterInfo) -> View:
    """A token's gradients are zero where it does not occur, so tokens hardly couple and have no factor."""
    return View(1, info.shape, (False, True))


@structure_of(nn.MultiheadAttention)
def _projections(info: ParameterInfo) -> View:
    """A packed weight (3·out, in) is three projections in a row; separate ones are single matrices."""
    packed = 3 if info.name.endswith("in_proj_weight") else 1
    return View(packed, (info.shape[0] // packed, prod(info.shape[1:])))


def view(info: ParameterInfo, structure: Structure, *, max_factor: int, dense_below: int) -> View:
    """How the tensor is seen under a structure.

    Biases, norms and layers without a rule have a diagonal; modes of one coordinate are dropped, and those longer than
    `max_factor` have no factor.

    Args:
        info: the tensor.
        structure: see `FishLegSettings.structure`.
        max_factor: the longest mode with a factor.
        dense_below: tensors of at most so many weights have one dense block.

    Raises:
        SettingsError: a dense block is longer than `max_factor`.
    """
    size, whole = info.size, View(1, (info.size,))
    # A space that was made from shapes alone names no layers; its matrices are taken for what they mostly are.
    rule = _outputs_by_inputs if info.layer is None else _RULES.get(info.layer)
    found = None if rule is None or len(info.shape) < 2 or structure == "diagonal" else rule(info)
    if found is not None and not (isinstance(found, View) and found.size == size):
        name = getattr(rule, "__name__", rule)
        raise SettingsError(
            f"the rule {name} returned {found} for '{info.name}' of shape {info.shape}; a View of its {size:,} "
            "weights was needed, or None"
        )
    if found is None:
        return View(1, (size,), (False,))
    if structure == "dense" and size > max_factor:
        raise SettingsError(
            f"structure 'dense' needs a factor of side {size:,} for '{info.name}', estimator.max_factor is "
            f"{max_factor:,}; use another structure, or estimator.max_factor={size}"
        )
    if structure == "dense" or size <= dense_below:
        return whole
    if structure == "blocks":
        found = View(found.groups * prod(found.modes[:-1]), found.modes[-1:])
    if structure == "three-factor" and len(info.shape) > 2 and len(found.modes) == 2:
        kernel = prod(info.shape[2:])
        found = View(found.groups, (found.modes[0], found.modes[1] // kernel, kernel), (*found.factored, True))
    kept = [i for i, d in enumerate(found.modes) if d > 1] or [0]
    modes = tuple(found.modes[i] for i in kept)
    return View(found.groups, modes, tuple(found.factored[i] and found.modes[i] <= max_factor for i in kept))
