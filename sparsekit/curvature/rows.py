"""Per-example gradients, streamed: the rows whose second moment is the Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsekit.curvature.hooked_layers import HookedLayer, hooked_layers, record_uses
from sparsekit.curvature.vectors import FisherKind, output_vectors, refuse_rounding
from sparsekit.errors import CurvatureError, ModelError
from sparsekit.problem.networks import check_examples_apart
from sparsekit.problem.objective import Objective, as_found
from sparsekit.problem.parameters import ParameterSpace

#: Examples at a time for parameters whose gradients come from `torch.func`.
FUNCTIONAL_CHUNK = 16


def gradient_rows(
    objective: Objective, fisher: FisherKind = "importance", *, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Rows G (b, n) with Σ over all rows of g gᵀ = N · F, N the number of examples.

    One row an example, but for `exact` a row an example and column of Λ^{1/2}, as several blocks of b rows for
    each batch. Every block is the caller's to keep.

    For the layers of `LAYER_RULES` one forward and one backward pass to the layers' outputs suffices: with inputs
    a_nt (patches) and output gradients d_nt at position t, G_n = Σ_t d_nt a_ntᵀ for a weight, summed over all uses
    of the layer. On the first batch this is compared with gradients of single examples; layers for which it does not
    hold go the slower way of all other parameters: one example at a time (`torch.func`).

    Args:
        objective: the model is left as it was found.
        fisher: a random vector with the output curvature Λ as its second moment, for classes a column of Λ^{1/2}
            drawn by its length (`importance`); a label drawn from the model (`sampled`); every column (`exact`, the
            Gauss-Newton matrix); the data's own label (`empirical`).
            All but the last estimate the same matrix. A position's weight in the loss multiplies the square of its
            gradient: one of weight two counts as two, in the empirical Fisher too.
        generator: for what is drawn.

    Raises:
        CurvatureError: a gradient is not finite, or the targets of an empirical Fisher are the network's own outputs.
        ModelError: the output for an example depends on the others of its batch.
    """
    model, likelihood, space = objective.model, objective.likelihood, objective.space
    with as_found(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        hooked = hooked_layers(model, space)
        for layer in hooked:  # the graph must reach the layers' outputs, and no further
            for parameter in layer.module.parameters(recurse=False):
                parameter.requires_grad_(True)
        functional = _others(space, hooked)
        checked = False
        for inputs, given, weight in objective.weighted():
            with record_uses(hooked), torch.enable_grad():
                output = model(inputs)
            vectors = output_vectors(likelihood, output, given, fisher, generator)
            if fisher == "empirical" and not checked:
                refuse_rounding(likelihood, output.detach(), given, vectors[0])
            if weight != 1:
                vectors = [vector * weight**0.5 for vector in vectors]
            for index, vector in enumerate(vectors):
                rows = vector.new_zeros(len(vector), space.size)
                gradients = space.unflatten_rows(rows)
                if not checked:
                    hooked = [layer for layer in hooked if layer.follows(len(vector))]
                _add_hooked_gradients(gradients, hooked, output, vector, retain=index < len(vectors) - 1)
                if not checked:
                    hooked = _confirmed(hooked, gradients, model, inputs, vector)
                    functional, checked = _others(space, hooked), True
                    if functional:  # among the reasons may be that examples are not computed apart
                        check_examples_apart(model, inputs)
                if functional:
                    for name, row in _functional_gradients(model, functional, inputs, vector).items():
                        gradients[name].copy_(row)
                _check_finite(rows, gradients)
                yield rows


def per_example_gradients(
    objective: Objective, fisher: FisherKind = "importance", *, generator: torch.Generator | None = None
) -> Iterator[dict[str, Tensor]]:
    """As `gradient_rows`, by parameter: name -> (b, *shape)."""
    for rows in gradient_rows(objective, fisher, generator=generator):
        yield objective.space.unflatten_rows(rows)


def _check_finite(rows: Tensor, gradients: Mapping[str, Tensor]) -> None:
    # A sum over what is not finite is not finite, and several times cheaper than `isfinite`. It may overflow
    # over finite values too, so it acquits but does not convict.
    if bool(rows.sum().isfinite()):
        return
    for name, gradient in gradients.items():
        if not bool(gradient.isfinite().all()):
            raise CurvatureError(f"the gradients of '{name}' are not finite; check the data, the loss and the weights")


# -- layers that have a rule ---------------------------------------------------------------------------------
def _add_hooked_gradients(
    gradients: Mapping[str, Tensor], layers: Sequence[HookedLayer], output: Tensor, vector: Tensor, *, retain: bool
) -> None:
    """Add to `gradients` what the layers contribute; a layer that did not run contributes nothing."""
    uses = [(layer, a, edge) for layer in layers for a, edge in layer.uses if edge is not None]
    if not uses:
        return
    try:
        found: Sequence[Tensor | None] = torch.autograd.grad(
            output, [z for _, _, z in uses], vector, retain_graph=retain, allow_unused=True
        )
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ModelError(
            "the model uses reentrant checkpointing, through which no single gradient can be taken; call checkpoint "
            "with use_reentrant=False"
        ) from None
    for (layer, given, _), pushed in zip(uses, found, strict=True):
        if pushed is None:  # the output does not depend on this call
            continue
        # A lookup's numbers stay what they are; what autocast has narrowed is widened again.
        d, a = pushed.to(vector.dtype), given.to(vector.dtype) if given.is_floating_point() else given
        if len(a) != len(vector):  # it would be broadcast over the examples, or fail obscurely
            raise CurvatureError(
                f"the layer of '{layer.names[0]}' was called with a batch of {len(a)} for {len(vector)} examples, "
                "though with as many as examples before; exclude its parameters"
            )
        if layer.bias is not None:
            gradients[layer.bias] += layer.rule.bias(layer.module, a, d)
        if layer.weight is not None:
            gradients[layer.weight] += layer.rule.weight(layer.module, a, d)


def _confirmed(
    layers: Sequence[HookedLayer], gradients: Mapping[str, Tensor], model: nn.Module, inputs: Tensor, vector: Tensor
) -> list[HookedLayer]:
    """The layers whose gradients of the first and the last example are those of the example alone."""
    names = list(dict.fromkeys(name for layer in layers for name in layer.names))
    some = sorted({0, len(vector) - 1})
    truth = _one_by_one(model, names, inputs[some], vector[some])
    coarsest = max(torch.finfo(dtype).eps for dtype in (vector.dtype, *(layer.dtype for layer in layers)) if dtype)
    tolerance = min(0.1, max(1e-6, 1e5 * coarsest))  # 1 % for float32: TF32 passes
    whole = torch.stack([t.norm() for t in truth.values()]).norm() if names else 0.0

    def agrees(name: str) -> bool:
        # `<=` and not `>`: where both are NaN nothing is confirmed, and the gradients of single examples judge
        return bool((gradients[name][some] - truth[name]).norm() <= tolerance * (truth[name].norm() + 1e-3 * whole))

    doubtful = {name for name in names if not agrees(name)}  # also of other layers that share the tensor
    return [layer for layer in layers if not doubtful & set(layer.names)]


# -- everything else --------------------------------------------------------------------------------------
def _others(space: ParameterSpace, hooked: Sequence[HookedLayer]) -> list[str]:
    known = {name for layer in hooked for name in layer.names}
    return [name for name in space.names if name not in known]


def _functional_gradients(
    model: nn.Module, names: Sequence[str], inputs: Tensor, vector: Tensor
) -> Mapping[str, Tensor]:
    """⟨vector_n, output_n⟩ differentiated example by example: the score's gradient by the chain rule."""
    inner, chosen = _one_example(model, names)
    gradient = torch.func.vmap(torch.func.grad(inner), in_dims=(None, 0, 0), chunk_size=FUNCTIONAL_CHUNK)
    try:
        found: dict[str, Tensor] = gradient(chosen, inputs, vector.detach())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # recurrent layers, and control flow that depends on the data, cannot be vectorised
        return _one_by_one(model, names, inputs, vector)
    return found


def _one_by_one(model: nn.Module, names: Sequence[str], inputs: Tensor, vector: Tensor) -> dict[str, Tensor]:
    """As `_functional_gradients`, in a loop of ordinary backward passes."""
    inner, chosen = _one_example(model, names)
    leaves = {name: p.requires_grad_(True) for name, p in chosen.items()}
    found: list[tuple[Tensor, ...]] = []
    for x, v in zip(inputs, vector.detach(), strict=True):
        with torch.enable_grad():
            score = inner(leaves, x, v)
        if leaves and score.requires_grad:
            found.append(torch.autograd.grad(score, list(leaves.values()), materialize_grads=True))
        else:
            found.append(tuple(torch.zeros_like(p) for p in leaves.values()))
    return {name: torch.stack(rows) for name, rows in zip(names, zip(*found, strict=True), strict=True)}


def _one_example(
    model: nn.Module, names: Sequence[str]
) -> tuple[Callable[[dict[str, Tensor], Tensor, Tensor], Tensor], dict[str, Tensor]]:
    """(values of the named parameters, x, v) -> ⟨v, output for x alone⟩; and the present values."""
    named = dict(model.named_parameters())
    chosen = {name: named[name].detach() for name in names}
    rest = {name: p.detach() for name, p in named.items() if name not in chosen}
    buffers = dict(model.named_buffers())

    def inner(values: dict[str, Tensor], x: Tensor, v: Tensor) -> Tensor:
        output = torch.func.functional_call(model, (values, rest, buffers), (x.unsqueeze(0),))
        return (output.squeeze(0) * v).sum()

    return inner, chosen
