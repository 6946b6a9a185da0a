"""Per-example gradients, streamed: the rows whose second moment is the Fisher information."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.errors import CurvatureError
from sparsekit.likelihoods import Likelihood
from sparsekit.objective import Objective, as_found
from sparsekit.parameters import ParameterSpace

FisherKind = Literal["importance", "sampled", "exact", "empirical"]

#: Examples at a time for parameters whose gradients come from `torch.func`.
FUNCTIONAL_CHUNK = 16


def gradient_rows(
    objective: Objective, fisher: FisherKind = "importance", *, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Rows G (b, n) with Σ over all rows of g gᵀ = N · F, N the number of examples.

    One row an example, but for `exact` a row an example and column of Λ^{1/2}, as several blocks of b rows for
    each batch.

    Args:
        objective: the model is left as it was found.
        fisher: a random vector with the output curvature Λ as its second moment, for classes a column of Λ^{1/2}
            drawn by its length (`importance`); a label drawn from the model (`sampled`); every column (`exact`, the
            Gauss-Newton matrix); the data's own label (`empirical`).
            All but the last estimate the same matrix.
        generator: for what is drawn.

    Raises:
        CurvatureError: a gradient is not finite.
    """
    for gradients in per_example_gradients(objective, fisher, generator=generator):
        yield objective.space.flatten_rows(gradients)


def per_example_gradients(
    objective: Objective, fisher: FisherKind = "importance", *, generator: torch.Generator | None = None
) -> Iterator[dict[str, Tensor]]:
    """As `gradient_rows`, by parameter: name -> (b, *shape).

    For the weights and biases of Linear and Conv layers one forward and one backward pass to the layers'
    outputs suffices: with inputs a_nt (patches) and output gradients d_nt at position t, G_n = Σ_t d_nt a_ntᵀ,
    summed over all uses of the layer. Other parameters go through `torch.func`, a few examples at a time.
    """
    model, likelihood = objective.model, objective.likelihood
    with as_found(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        hooked = layers_with_weights(model, objective.space)
        functional = [name for name in objective.space.names if name not in {n for u in hooked for n in u.names}]
        for use in hooked:  # the graph must reach the layers' outputs, and no further
            for parameter in use.module.parameters(recurse=False):
                parameter.requires_grad_(True)
        for inputs, given in objective.on_device():
            with record_uses(hooked), torch.enable_grad():
                output = model(inputs)
            vectors = _output_vectors(likelihood, output, given, fisher, generator)
            for index, vector in enumerate(vectors):
                last = index == len(vectors) - 1
                rows = _hooked_gradients(hooked, output, vector, retain=not last)
                if functional:
                    rows |= _functional_gradients(model, functional, inputs, vector)
                for name, row in rows.items():
                    if not bool(row.isfinite().all()):
                        raise CurvatureError(
                            f"the gradients of '{name}' are not finite; check the data, the loss and the weights"
                        )
                yield rows


def _output_vectors(
    likelihood: Likelihood, output: Tensor, targets: Tensor, fisher: FisherKind, generator: torch.Generator | None
) -> list[Tensor]:
    """What is propagated back: vectors v, shaped like `output`, with E Σ v vᵀ = Λ (or its empirical stand-in)."""
    if fisher in ("importance", "exact"):
        scale = likelihood.score_scale(likelihood.positions(output))
        if fisher == "exact":
            return [column * scale for column in likelihood.root_columns(output)]
        return [likelihood.drawn_root(output, _needed(generator)) * scale]
    if fisher == "sampled":
        targets = likelihood.sample(output.detach(), _needed(generator))
    leaf = output.detach().requires_grad_(True)
    with torch.enable_grad():
        score = likelihood.score(leaf, targets).sum()
    return list(torch.autograd.grad(score, leaf))


def _needed(generator: torch.Generator | None) -> torch.Generator:
    if generator is None:
        raise ValueError("what is drawn at random needs a generator")
    return generator


# -- layers whose gradients follow from inputs and output gradients ------------------------------------------
@dataclass
class HookedLayer:
    """A layer whose gradients follow from its inputs and its outputs' gradients, and its calls in one pass."""

    module: nn.Module
    weight: str | None  # names in the space; None where the parameter is not prunable
    bias: str | None
    uses: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (input, output) of each call

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name is not None)


def layers_with_weights(model: nn.Module, space: ParameterSpace) -> list[HookedLayer]:
    """The Linear and convolution layers with a prunable weight or bias that no other kind of module shares."""
    by_tensor: dict[Tensor, str] = {p: name for name, p in space.tensors(model).items()}
    layers = []
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) or not _is_supported(module):
            continue
        weight, bias = by_tensor.get(module.weight), None
        if module.bias is not None:
            bias = by_tensor.get(module.bias)
        if weight is not None or bias is not None:
            layers.append(HookedLayer(module, weight, bias))
    # A tensor that also belongs to another kind of module (an embedding tied to a decoder) has gradients the
    # hooks do not see.
    foreign = {
        by_tensor[p]
        for module in model.modules()
        if not _is_supported(module)
        for p in module.parameters(recurse=False)
        if p in by_tensor
    }
    return [layer for layer in layers if not foreign & set(layer.names)]


def _is_supported(module: nn.Module) -> bool:
    if type(module) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        # The output projection of attention is called through a functional and never runs as a module.
        return type(module) is nn.Linear
    return type(module) in (nn.Conv1d, nn.Conv2d) and module.padding_mode == "zeros"


def record_uses(layers: list[HookedLayer]) -> ExitStack:
    """While it is open, every call of the layers is noted in their `uses`."""
    stack = ExitStack()
    for layer in layers:
        layer.uses.clear()

        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor, layer: HookedLayer = layer) -> None:
            layer.uses.append((args[0].detach(), output))

        handle = layer.module.register_forward_hook(hook)
        stack.callback(handle.remove)
    return stack


def _hooked_gradients(layers: list[HookedLayer], output: Tensor, vector: Tensor, *, retain: bool) -> dict[str, Tensor]:
    if not layers:
        return {}
    outputs = [z for layer in layers for _, z in layer.uses]
    if not outputs:
        raise CurvatureError(f"no layer of {[n for layer in layers for n in layer.names]} ran in the forward pass")
    gradients = torch.autograd.grad(output, outputs, vector, retain_graph=retain, allow_unused=True)
    found = iter(gradients)
    rows: dict[str, Tensor] = {}
    for layer in layers:
        for a, z in layer.uses:
            d = next(found)
            d = torch.zeros_like(z) if d is None else d
            for name, part in _layer_gradients(layer, a, d).items():
                rows[name] = rows[name] + part if name in rows else part
        for name in layer.names:
            if name not in rows:  # the layer did not run for this input: its loss does not depend on it
                shape = dict(layer.module.named_parameters(recurse=False))[name.rsplit(".", 1)[-1]].shape
                rows[name] = vector.new_zeros(len(vector), *shape)
    return rows


def _layer_gradients(layer: HookedLayer, a: Tensor, d: Tensor) -> dict[str, Tensor]:
    rows = {}
    module = layer.module
    if isinstance(module, nn.Linear):
        a, d = (
            a.reshape(len(a), -1, a.shape[-1]),
            d.reshape(len(d), -1, d.shape[-1]),
        )  # (b, T, in), (b, T, out)
        if layer.weight is not None:
            rows[layer.weight] = d.mT @ a
        if layer.bias is not None:
            rows[layer.bias] = d.sum(1)
        return rows
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    if layer.bias is not None:
        rows[layer.bias] = d.flatten(2).sum(2)
    if layer.weight is not None:
        groups, b = module.groups, len(a)
        patches = input_patches(module, a).view(b, groups, -1, d[0, 0].numel())  # (b, g, in/g·k, T)
        d = d.reshape(b, groups, -1, patches.shape[-1])  # (b, g, out/g, T)
        rows[layer.weight] = (d @ patches.mT).view(b, *module.weight.shape)
    return rows


def input_patches(module: nn.Conv1d | nn.Conv2d, a: Tensor) -> Tensor:
    """(b, in·k, T): the inputs that each output position of a convolution sees."""
    stride, dilation, size = module.stride, module.dilation, module.kernel_size
    padding = module.padding
    if isinstance(padding, str):  # 'same' pads the right side more where the total is odd
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, size, strict=True)]
        a = F.pad(a, [side for t in reversed(total) for side in (t // 2, t - t // 2)])
        padding = (0,) * len(size)
    if isinstance(module, nn.Conv1d):
        a, size, stride = a.unsqueeze(2), (1, *size), (1, *stride)
        padding, dilation = (0, *padding), (1, *dilation)
    return F.unfold(a, size, dilation=dilation, padding=padding, stride=stride)


# -- everything else --------------------------------------------------------------------------------------
def _functional_gradients(model: nn.Module, names: list[str], inputs: Tensor, vector: Tensor) -> dict[str, Tensor]:
    """⟨vector_n, output_n⟩ differentiated example by example: the score's gradient by the chain rule."""
    named = dict(model.named_parameters())
    chosen = {name: named[name].detach() for name in names}
    rest = {name: p.detach() for name, p in named.items() if name not in chosen}
    buffers = dict(model.named_buffers())

    def inner(values: dict[str, Tensor], x: Tensor, v: Tensor) -> Tensor:
        output = torch.func.functional_call(model, (values, rest, buffers), (x.unsqueeze(0),))
        return (output.squeeze(0) * v).sum()

    gradient = torch.func.vmap(torch.func.grad(inner), in_dims=(None, 0, 0), chunk_size=FUNCTIONAL_CHUNK)
    return dict(gradient(chosen, inputs, vector.detach()))
