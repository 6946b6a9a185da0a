"""A cache of activations, so that repeated passes do not recompute the layers that are final."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from sparsekit.machine import available_memory

#: An output stays on its device while that has so many times its size free.
ROOM = 8


class Replay:
    """A cache of modules' outputs; while it is entered, modules with a cached output return it without computing.

    It is for work from the first layer to the last. A pass over a batch runs up to the first layer that will still
    change, where the caller sets `settled = False`. The outputs of modules before that are final, and later passes over
    the same batch take them from the cache, so that a pass costs little more than one layer. The outputs of the
    outermost such modules are cached, on the host, as far as the memory allows; others are computed again.

    Modules that write to their arguments are never cached. Other side effects of a cached module do not happen again:
    if a module may have some, compare with an uncached pass (`batch=None`).

    Attributes:
        batch: the number of the batch of the next pass, whose inputs must be the same each time; None: everything is
            computed, and nothing is cached.
        settled: whether everything computed so far in this pass is final.

    Args:
        model: its modules' `forward` methods are replaced, and restored at the end.
        limit: largest number of bytes in the cache.
    """

    def __init__(self, model: nn.Module, limit: int) -> None:
        self.limit, self._bytes = limit, 0
        self._kept: dict[int, dict[str, _Kept]] = {}  # by batch and module
        self._modules = {
            name: module
            for name, module in model.named_modules()
            if name and not isinstance(module, torch.jit.ScriptModule)
        }
        self._below = {
            name: [other for other in self._modules if other.startswith(f"{name}.")] for name in self._modules
        }
        self._own: dict[str, Callable[..., object] | None] = {}
        self._calls: Counter[str] = Counter()  # of each module in this pass
        self._never: set[str] = set()
        self.batch: int | None = None
        self.settled = False

    def __enter__(self) -> Self:
        for name, module in self._modules.items():
            self._own[name] = module.__dict__.get("forward")
            module.forward = self._replaying(name, module.forward)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for name, module in self._modules.items():
            del module.forward
            if self._own[name] is not None:
                module.forward = self._own[name]
        self.forget()

    def begin(self, batch: int | None) -> None:
        """Begin a pass over a batch; see `batch`."""
        self.batch, self.settled = batch, True
        self._calls.clear()

    def forget(self) -> None:
        """Empty the cache, because layers from the first on will change again."""
        self._kept.clear()
        self._bytes = 0

    def _replaying(self, name: str, forward: Callable[..., object]) -> Callable[..., object]:
        def replaced(*args: object, **kwargs: object) -> object:
            if self.batch is None:
                return forward(*args, **kwargs)
            self._calls[name] += 1
            if self._calls[name] > 1:  # one cached output cannot serve several calls
                self._give_up(name)
            found = self._kept.get(self.batch, {}).get(name)
            if found is not None:
                return found.again()
            given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            before = [a._version for a in given]
            output = forward(*args, **kwargs)
            if before != [a._version for a in given]:
                self._give_up(name)
            elif self.settled and name not in self._never:
                self._keep(self.batch, name, output)
            return output

        return replaced

    def _give_up(self, name: str) -> None:
        self._never.add(name)
        for batch in self._kept:
            self._drop(batch, name)

    def _keep(self, batch: int, name: str, output: object) -> None:
        whole = output if type(output) is tuple else (output,)
        if not all(part is None or type(part) is Tensor for part in whole):
            return
        made = _Kept(whole, type(output) is tuple)
        mine = self._kept.setdefault(batch, {})
        if made.size > self.limit - self._bytes + sum(kept.size for kept in mine.values()):
            return
        for other in self._below[name]:
            self._drop(batch, other)
        while made.size > self.limit - self._bytes:  # the earliest modules of the batch are needed least
            self._drop(batch, next(iter(mine)))
        mine[name] = made.copied()
        self._bytes += made.size

    def _drop(self, batch: int, name: str) -> None:
        dropped = self._kept.get(batch, {}).pop(name, None)
        if dropped is not None:
            self._bytes -= dropped.size


class _Kept:
    """A module's output, on its device while there is room for it, else on the host; and the devices of its parts."""

    def __init__(self, parts: tuple[Tensor | None, ...], several: bool) -> None:
        self._parts, self._several = parts, several
        self._devices = [None if part is None else part.device for part in parts]
        self.size = sum(part.nbytes for part in parts if part is not None)

    def copied(self) -> Self:
        """Copy the parts, because later modules may change them in place."""
        self._parts = tuple(None if part is None else _copy(part.detach()) for part in self._parts)
        return self

    def again(self) -> Tensor | None | tuple[Tensor | None, ...]:
        """A copy of the output on its original devices."""
        placed = zip(self._parts, self._devices, strict=True)
        parts = tuple(None if part is None else part.to(device, copy=True) for part, device in placed)
        return parts if self._several else parts[0]


def _copy(part: Tensor) -> Tensor:
    on_host = part.device.type == "cpu" or ROOM * part.nbytes > available_memory(part.device).device
    return part.to("cpu" if on_host else part.device, copy=True)
