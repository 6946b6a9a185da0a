"""Forward and backward passes that give each parameter's per-example gradients, checked on the first batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsekit import processes
from sparsekit.curvature.functional import functional_gradients, one_by_one
from sparsekit.curvature.hooked_layers import HookedLayer, hooked_layers, record_uses
from sparsekit.curvature.layers import LayerGradients
from sparsekit.curvature.sums import BATCHES, FiniteSums
from sparsekit.curvature.vectors import FisherKind, output_vectors, refuse_rounding
from sparsekit.errors import CurvatureError, ModelError, SettingsError
from sparsekit.problem.networks import check_examples_apart
from sparsekit.problem.objective import Objective, as_found
from sparsekit.problem.parameters import ParameterSpace


def layer_gradients(
    objective: Objective,
    fisher: FisherKind = "importance",
    *,
    generator: torch.Generator | None = None,
    shared: bool = False,
) -> Iterator[dict[str, LayerGradients]]:
    """Per-example gradients, batch by batch: name of a parameter -> its gradients G_n, in the order of the space.

    Σ over all batches of g gᵀ, g the gradients of all parameters of an example in one vector, is N · F, N the number of
    examples; with `exact` there is one item for each batch and column of Λ^{1/2}, else one for each batch.

    For the layers of `LAYER_RULES` one forward pass and one backward pass to the layers' outputs suffices, whatever the
    number of their weights. This takes the first dimension of the layer's input for the examples, and the layer for the
    only one to use its parameters; on the first batch it is compared with gradients of single examples, and layers for
    which it does not hold go the slower way of all other parameters: one example at a time (`torch.func`). Memory:
    inputs and output gradients of the layers, and the rows of parameters that have no rule.

    Args:
        objective: the model is left as it was found.
        fisher: a random vector with the output curvature Λ as its second moment, for classes a column of Λ^{1/2}
            drawn by its length (`importance`); a label drawn from the model (`sampled`); every column (`exact`, the
            Gauss-Newton matrix); the data's own label (`empirical`).
            All but the last estimate the same matrix. A position's weight in the loss multiplies the square of its
            gradient: one of weight two counts as two, in the empirical Fisher too.
        generator: for what is drawn.
        shared: whether each process of a run with several takes its share of the batches. Sums over all examples are
            then `SharedSum`s. What is drawn is the same with any number of processes.

    Raises:
        CurvatureError: a gradient is not finite, or the targets of an empirical Fisher are the network's own outputs.
        ModelError: the output for an example depends on the others of its batch.
    """
    model, likelihood, space = objective.model, objective.likelihood, objective.space
    with as_found(model):
        hooked, checked = _traced(model, space), False
        batches = _own_share(objective, fisher, generator) if shared and processes.size() > 1 else objective.weighted()
        finite = FiniteSums()
        for inputs, given, weight in batches:
            with record_uses(hooked), torch.enable_grad():
                output = model(inputs)
            vectors = output_vectors(likelihood, output, given, fisher, generator)
            if not checked:
                hooked = [layer for layer in hooked if layer.follows(len(inputs))]
                if fisher == "empirical":
                    refuse_rounding(likelihood, output.detach(), given, vectors[0])
            if weight != 1:
                vectors = [vector * weight**0.5 for vector in vectors]
            for index, vector in enumerate(vectors):
                found = _hooked_gradients(space, hooked, output, vector, retain=index < len(vectors) - 1)
                if not checked:
                    hooked, checked = _confirmed(hooked, found, model, inputs, vector), True
                    if _others(space, hooked):  # among the reasons may be that examples are not computed apart
                        check_examples_apart(model, inputs)
                functional = _others(space, hooked)
                rest = functional_gradients(model, functional, inputs, vector) if functional else {}
                for name, rows in rest.items():
                    found[name] = LayerGradients(name, rows.shape[1:], len(vector), rows=rows.to(vector.dtype))
                finite.add({name: one.parts() for name, one in found.items()})
                yield {name: found[name] for name in space.names}
        finite.check()


def _traced(model: nn.Module, space: ParameterSpace) -> list[HookedLayer]:
    """The layers with a rule. The graph of a pass reaches their outputs, and no further."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    hooked = hooked_layers(model, space)
    for layer in hooked:
        for parameter in layer.module.parameters(recurse=False):
            parameter.requires_grad_(True)
    return hooked


def _own_share(
    objective: Objective, fisher: FisherKind, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """This process's batches. For those of the others, what they draw is drawn too: it depends on shapes alone."""
    shapes: dict[torch.Size, torch.Size] = {}  # of an example's inputs -> of its outputs
    number = -1
    for number, (inputs, given, weight) in enumerate(objective.weighted()):
        if number // BATCHES % processes.size() == processes.rank():
            yield inputs, given, weight
        elif fisher in ("importance", "sampled"):
            if inputs.shape[1:] not in shapes:
                with torch.no_grad():
                    shapes[inputs.shape[1:]] = objective.model(inputs[:1]).shape[1:]
            like = torch.zeros(len(inputs), *shapes[inputs.shape[1:]], dtype=objective.dtype, device=inputs.device)
            output_vectors(objective.likelihood, like, given, fisher, generator)
    if number < BATCHES * (processes.size() - 1):
        raise SettingsError(
            f"{number + 1} calibration batches are shared by {processes.size()} processes, {BATCHES} at a time, so "
            "that one at least has none: lower estimator.batch_size, or start fewer processes"
        )


def _others(space: ParameterSpace, hooked: Sequence[HookedLayer]) -> list[str]:
    known = {name for layer in hooked for name in layer.names}
    return [name for name in space.names if name not in known]


def _hooked_gradients(
    space: ParameterSpace, layers: Sequence[HookedLayer], output: Tensor, vector: Tensor, *, retain: bool
) -> dict[str, LayerGradients]:
    """Of the layers' parameters, by name; those of a layer that did not run are zero."""
    uses: dict[str, list[tuple[HookedLayer, Tensor, Tensor]]] = {name: [] for layer in layers for name in layer.names}
    for layer, given, pushed in _backward(layers, output, vector, retain=retain):
        # A lookup's numbers stay what they are; what autocast has narrowed is widened again.
        d, a = pushed.to(vector.dtype), given.to(vector.dtype) if given.is_floating_point() else given
        if len(a) != len(vector):  # it would be broadcast over the examples, or fail obscurely
            raise CurvatureError(
                f"the layer of '{layer.names[0]}' was called with a batch of {len(a)} for {len(vector)} examples, "
                "though with as many as examples before; exclude its parameters"
            )
        for name in layer.names:
            uses[name].append((layer, a, d))
    found = {}
    for name, known in uses.items():
        shape = space[name].shape
        rows = None if known else vector.new_zeros(()).expand(len(vector), *shape)
        found[name] = LayerGradients(name, shape, len(vector), uses=known, rows=rows)
    return found


def _backward(
    layers: Sequence[HookedLayer], output: Tensor, vector: Tensor, *, retain: bool
) -> Iterator[tuple[HookedLayer, Tensor, Tensor]]:
    """(layer, input, gradient of ⟨vector, output⟩ by its output) for each call that the output depends on."""
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
    for (layer, a, _), d in zip(uses, found, strict=True):
        if d is not None:
            yield layer, a, d


def _confirmed(
    layers: Sequence[HookedLayer],
    gradients: Mapping[str, LayerGradients],
    model: nn.Module,
    inputs: Tensor,
    vector: Tensor,
) -> list[HookedLayer]:
    """The layers whose gradients of the first and the last example are those of the example alone."""
    names = list(dict.fromkeys(name for layer in layers for name in layer.names))
    some = torch.tensor(sorted({0, len(vector) - 1}), device=vector.device)
    truth = one_by_one(model, names, inputs[some], vector[some])
    coarsest = max(torch.finfo(dtype).eps for dtype in (vector.dtype, *(layer.dtype for layer in layers)) if dtype)
    tolerance = min(0.1, max(1e-6, 1e5 * coarsest))  # 1 % for float32: TF32 passes
    whole = torch.stack([t.norm() for t in truth.values()]).norm() if names else 0.0

    def agrees(name: str) -> bool:
        # `<=` and not `>`: where both are NaN nothing is confirmed, and the gradients of single examples judge
        apart = (gradients[name].rows(some) - truth[name]).norm()
        return bool(apart <= tolerance * (truth[name].norm() + 1e-3 * whole))

    doubtful = {name for name in names if not agrees(name)}  # also of other layers that share the tensor
    return [layer for layer in layers if not doubtful & set(layer.names)]
