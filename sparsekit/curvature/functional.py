"""Per-example gradients of any parameter by `torch.func`, one example at a time: slow, but right for every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

#: Examples at a time.
CHUNK = 16


def functional_gradients(
    model: nn.Module, names: Sequence[str], inputs: Tensor, vector: Tensor
) -> Mapping[str, Tensor]:
    """⟨vector_n, output_n⟩ differentiated example by example: the score's gradient by the chain rule."""
    inner, chosen = _one_example(model, names)
    gradient = torch.func.vmap(torch.func.grad(inner), in_dims=(None, 0, 0), chunk_size=CHUNK)
    try:
        found: dict[str, Tensor] = gradient(chosen, inputs, vector.detach())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # recurrent layers, and control flow that depends on the data, cannot be vectorised
        return one_by_one(model, names, inputs, vector)
    return found


def one_by_one(model: nn.Module, names: Sequence[str], inputs: Tensor, vector: Tensor) -> dict[str, Tensor]:
    """As `functional_gradients`, in a loop of ordinary backward passes."""
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
