"""Removed weights that stay zero in anybody's training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsekit.errors import ModelError, SettingsError, unknown_name

#: What wrappers put before the names of the module that they wrap: DistributedDataParallel, torch.compile.
PREFIXES = ("module.", "_orig_mod.")


class Kept:
    """Keeps removed weights at zero while it lasts; what `keep` returns.

    After every step of whatever optimiser, removed weights become zero, and so does all that the optimiser remembers of
    them (momentum, moments), so that weight decay, momentum and adaptive rates change nothing of them. It is a context
    manager; `remove` ends it too.
    """

    def __init__(self, model: nn.Module, mask: Mapping[str, Tensor]) -> None:
        self._removed = removed_in(model, mask)
        self._by_id = {id(parameter): gone for parameter, gone in self._removed}
        clear(self._removed)
        self._hook = register_optimizer_step_post_hook(self._after)

    def _after(self, optimiser: Optimizer, *_: Any) -> None:
        stepped = (p for group in optimiser.param_groups for p in group["params"])
        clear([(p, self._by_id[id(p)]) for p in stepped if id(p) in self._by_id], optimiser)

    def remove(self) -> None:
        """Let the weights go."""
        self._hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()


def keep(model: nn.Module, mask: Mapping[str, Tensor]) -> Kept:
    """Keep the removed weights of a model at zero in a training loop of one's own.

    With any optimiser of torch, under AMP's gradient scaling, gradient accumulation, DistributedDataParallel and
    torch.compile of the model::

        with sparsekit.keep(model, pruned.mask):
            train(model)  # or Trainer(model, …).train()

    Args:
        model: whose parameters are trained, or a wrapper of it. Not copied: the parameters must stay the same objects.
        mask: name of a parameter -> bool tensor of its shape, True = kept, as in `Pruned.mask`; read from a file by
            `sparsekit.runs.masks.read_mask`.

    Returns:
        What ends it: a context manager, or `.remove()`.

    Raises:
        ModelError: the model has no such parameter, or one of another shape.
        SettingsError: the mask is not of bool tensors.
    """
    return Kept(model, mask)


@torch.no_grad()
def check(model: nn.Module, mask: Mapping[str, Tensor]) -> float:
    """Whether all removed weights are zero; the fraction of the mask's weights that are removed.

    Args:
        model: or a wrapper of it.
        mask: as for `keep`.

    Raises:
        ModelError: some removed weights are not zero, with how many of which parameter; or as `keep`.
        SettingsError: as `keep`.
    """
    removed = removed_in(model, mask)
    names = list(mask)
    wrong = {name: int(p[gone].count_nonzero()) for name, (p, gone) in zip(names, removed, strict=True)}
    wrong = {name: count for name, count in wrong.items() if count}
    if wrong:
        told = ", ".join(f"{count:,} of '{name}'" for name, count in list(wrong.items())[:3])
        more = f" and of {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(
            f"removed weights are not zero: {told}{more}; train inside `sparsekit.keep(model, mask)`, or apply the mask"
        )
    total = sum(gone.numel() for _, gone in removed)
    return sum(int(gone.sum()) for _, gone in removed) / total if total else 0.0


def removed_in(model: nn.Module, mask: Mapping[str, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
    """Each parameter of the mask with what is removed of it, beside it."""
    found = {_plain(name): parameter for name, parameter in model.named_parameters()}
    out = []
    for name, kept in mask.items():
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
            given = kept.dtype if isinstance(kept, Tensor) else type(kept).__name__
            raise SettingsError(f"the mask of '{name}' is {given}; a bool tensor, True = kept, is needed")
        parameter = found.get(_plain(name))
        if parameter is None:
            raise ModelError(unknown_name("parameter", name, list(found)))
        if parameter.shape != kept.shape:
            raise ModelError(
                f"the mask of '{name}' has the shape {tuple(kept.shape)}, the parameter {tuple(parameter.shape)}; give "
                "the mask of this model"
            )
        out.append((parameter, ~kept.to(parameter.device)))
    return out


def _plain(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.removeprefix(PREFIXES[0]).removeprefix(PREFIXES[1])
    return name


@torch.no_grad()
def clear(removed: Sequence[tuple[nn.Parameter, Tensor]], optimiser: Optimizer | None = None) -> None:
    """Removed weights become zero, and so does what the optimiser remembers of them."""
    for parameter, gone in removed:
        parameter.masked_fill_(gone, 0.0)
        for value in optimiser.state[parameter].values() if optimiser is not None else ():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.masked_fill_(gone, 0.0)
