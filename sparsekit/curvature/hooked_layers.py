"""The layers whose calls are recorded during a pass, with their inputs and the nodes of their outputs in the graph."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from sparsekit.curvature.layer_rules import LAYER_RULES, LayerRule, has_rule
from sparsekit.problem.parameters import ParameterSpace


@dataclass
class HookedLayer:
    """A layer whose gradients follow from its inputs and its outputs' gradients, and its calls in one pass.

    Attributes:
        uses: of each call the input, and the place of the output in the graph, None where nothing is to be
            differentiated. Not the output itself: an activation in place would make that its own.
        dtype: of the last output; less precise than the weights' under autocast.
    """

    module: nn.Module
    weight: str | None  # names in the space; None where the parameter is not prunable
    bias: str | None
    uses: list[tuple[Tensor, GradientEdge | None]] = field(default_factory=list)
    dtype: torch.dtype | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def rule(self) -> LayerRule:
        return LAYER_RULES[type(self.module)]

    def follows(self, examples: int) -> bool:
        """Whether it ran, and its inputs can have `examples` as their first dimension."""
        fewest = self.rule.dimensions(self.module)
        return bool(self.uses) and all(a.dim() >= fewest and len(a) == examples for a, _ in self.uses)


def hooked_layers(model: nn.Module, space: ParameterSpace) -> list[HookedLayer]:
    """The layers of `LAYER_RULES` with a prunable weight or bias that no other kind of module shares."""
    by_tensor: dict[Tensor, str] = {p: name for name, p in space.tensors(model).items()}
    layers = []
    for module in model.modules():
        if has_rule(module):
            own = dict(module.named_parameters(recurse=False))
            weight, bias = (by_tensor[own[k]] if k in own and own[k] in by_tensor else None for k in ("weight", "bias"))
            if weight is not None or bias is not None:
                layers.append(HookedLayer(module, weight, bias))
    # A tensor that also belongs to another kind of module has gradients the hooks do not see.
    foreign = {
        by_tensor[p]
        for module in model.modules()
        if not has_rule(module)
        for p in module.parameters(recurse=False)
        if p in by_tensor
    }
    return [layer for layer in layers if not foreign & set(layer.names)]


def record_uses(layers: Sequence[HookedLayer]) -> ExitStack:
    """Inside, every call of the layers is recorded in their `uses`."""
    stack = ExitStack()
    for layer in layers:
        layer.uses.clear()

        def hook(
            _module: nn.Module,
            args: tuple[Tensor, ...],
            kwargs: dict[str, Tensor],
            output: Tensor,
            layer: HookedLayer = layer,
        ) -> None:
            given = args[0] if args else kwargs["input"]
            layer.dtype = output.dtype
            layer.uses.append((given.detach(), get_gradient_edge(output) if output.requires_grad else None))

        handle = layer.module.register_forward_hook(hook, with_kwargs=True)
        stack.callback(handle.remove)
    return stack
