"""Sums over many batches that keep float64's precision at nearly the cost of the batches' own type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sparsekit import processes
from sparsekit.errors import CurvatureError

#: Tensors that are added up in their own type before they are added to the sum in float64. Several processes share
#: batches in groups of so many, so that these parts, and with them the rounding, are the same for any number.
BATCHES = 8

#: Rows of factors that are collected before they are multiplied: products with fewer are bound by memory.
ROWS = 256


class RunningSum:
    """Σ of tensors, or of products XᵀY, of one shape, in float64.

    Adding to float64 reads and writes three times as much as adding float32 to float32, so that the last few terms are
    first added up in their own type. This rounds as the sum over a batch does that each term is.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._few: Tensor | None = None
        self._count = 0
        self._factors: list[tuple[Tensor, Tensor]] = []
        self._rows = self._products = 0

    def add(self, part: Tensor) -> None:
        """Add a tensor, which is given away: it may be changed."""
        self._few = part if self._few is None else self._few.add_(part)
        self._count += 1
        if self._count == BATCHES:
            self._flush()

    def add_product(self, X: Tensor, Y: Tensor) -> None:
        """Add XᵀY for X (…, k, p) and Y (…, k, q), which are given away; they may be the same."""
        self._factors.append((X, Y))
        self._rows += X.shape[-2]
        self._products += 1
        if self._rows >= ROWS or self._products % BATCHES == 0:
            self._multiply()

    def _multiply(self) -> None:
        if self._factors:
            X, Y = (torch.cat(parts, -2) if len(parts) > 1 else parts[0] for parts in zip(*self._factors, strict=True))
            self._factors, self._rows = [], 0
            self._count = max(self._count, BATCHES - 1)  # it is as good as several batches
            self.add(X.mT @ Y)

    def _flush(self) -> None:
        if self._few is not None:
            self._total = self._few.double() if self._total is None else self._total.add_(self._few)
        self._few, self._count = None, 0

    def value(self) -> Tensor:
        """The sum in float64, not a copy.

        Raises:
            ValueError: nothing was added.
        """
        self._multiply()
        self._flush()
        if self._total is None:
            raise ValueError("there is no sum of no tensors; give one batch at least")
        self._total = self._complete(self._total)
        return self._total

    def _complete(self, total: Tensor) -> Tensor:
        """The sum as it is read."""
        return total

    def mean(self, count: int) -> Tensor:
        """The sum, used up, over `count` examples.

        Raises:
            CurvatureError: it is not finite.
        """
        mean = self.value().div_(count)
        if not bool(mean.sum().isfinite()) and not bool(mean.isfinite().all()):
            raise CurvatureError("the squares of the gradients overflow; use a model in float64, or scale its loss")
        return mean


class FiniteSums:
    """Whether all numbers of many tensors are finite, found out at the end: each look makes an accelerator's host wait.

    The least and the greatest of numbers are finite only if all are, and take a fraction of the time of `isfinite`.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._total: Tensor | None = None

    def add(self, parts: Mapping[str, Iterable[Tensor]]) -> None:
        """Take a batch's tensors, by the names of the parameters whose gradients they make."""
        self._names = list(parts)
        ends = ([end for one in of for end in one.aminmax()] for of in parts.values())
        found = torch.stack([torch.stack(few).double().sum() for few in ends])
        self._total = found if self._total is None else self._total + found

    def check(self) -> None:
        """A CurvatureError that names the parameter where one was not finite."""
        if self._total is None or bool(self._total.sum().isfinite()):
            return
        name = self._names[int((~self._total.isfinite()).nonzero()[0])]
        raise CurvatureError(f"the gradients of '{name}' are not finite; check the data, the loss and the weights")


class SharedSum(RunningSum):
    """The sum over all processes of a run, for what `layer_gradients(…, shared=True)` gives each of them.

    With one process it is a `RunningSum`. Every process reads the same sums in the same order; a sum that was read
    takes no more terms.
    """

    def __init__(self) -> None:
        super().__init__()
        self._read = False

    def add(self, part: Tensor) -> None:
        if self._read and processes.size() > 1:
            raise ValueError("a sum that was read over all processes takes no more terms")
        super().add(part)

    def _complete(self, total: Tensor) -> Tensor:
        if not self._read:
            total = processes.summed(total)
        self._read = True
        return total
