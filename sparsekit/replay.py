"""Passes through a network whose beginning stays as it was, without computing the beginning again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn


class Replay:
    """While it is entered, modules that returned before `settled` was withdrawn give what they gave before.

    For work from the first layer to the last: a pass over a batch runs up to the first layer that is still to change,
    where the caller says `settled = False`. What modules returned until then depends on nothing that will change, and
    later passes over the same batch take it from here, so that each pass costs little more than one layer. The
    outermost such modules are kept, on the host, as far as the memory allows; what is not kept is computed again.

    Attributes:
        batch: which batch the next pass is over; its inputs must be the same each time.
        settled: whether all that was computed in this pass is final.

    Args:
        model: modules are watched by way of their `forward`, which is put back at the end.
        limit: bytes to keep at most.
    """

    def __init__(self, model: nn.Module, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: dict[tuple[int, str], Any] = {}
        self._sizes: dict[tuple[int, str], int] = {}
        self._modules = {
            name: module
            for name, module in model.named_modules()
            if name and not isinstance(module, torch.jit.ScriptModule)
        }
        self._below = {
            name: [other for other in self._modules if other.startswith(f"{name}.")] for name in self._modules
        }
        self._own: dict[str, Any] = {}
        self._calls: Counter[str] = Counter()
        self._once: set[str] | None = None
        self.batch, self.settled = 0, True

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

    def learn(self) -> None:
        """After one whole pass: only modules that ran once in it are kept, for one output stands for all of them."""
        self._once = {name for name, count in self._calls.items() if count == 1}

    def forget(self) -> None:
        """Layers from the first on will change again."""
        self._kept.clear()
        self._sizes.clear()
        self._bytes = 0

    def _replaying(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(*args: Any, **kwargs: Any) -> Any:
            found = self._kept.get((self.batch, name))
            if found is not None:
                device = next((a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
                return _mapped(found, lambda t: t.to(device or t.device, copy=True))
            self._calls[name] += 1
            output = forward(*args, **kwargs)
            if self.settled and self._once is not None and name in self._once:
                self._keep(name, output)
            return output

        return replaced

    def _keep(self, name: str, output: Any) -> None:
        if type(output) is tuple and all(part is None or isinstance(part, Tensor) for part in output):
            parts = [part for part in output if part is not None]
        elif isinstance(output, Tensor):
            parts = [output]
        else:
            return
        for other in self._below[name]:
            self._drop((self.batch, other))
        size = sum(part.nbytes for part in parts)
        while self._kept and self._bytes + size > self._limit:
            self._drop(next(iter(self._kept)))
        if size <= self._limit:
            # a copy, because what comes next may work in place
            self._kept[self.batch, name] = _mapped(output, lambda t: t.to("cpu", copy=True))
            self._sizes[self.batch, name] = size
            self._bytes += size

    def _drop(self, key: tuple[int, str]) -> None:
        if key in self._kept:
            del self._kept[key]
            self._bytes -= self._sizes.pop(key)


def _mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, Tensor):
        return change(output)
    return tuple(None if part is None else change(part) for part in output)
