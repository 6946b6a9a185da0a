"""The built-in patterns: which sets of weights may be removed together."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sparsekit.errors import SettingsError
from sparsekit.interfaces import Pattern, Settings
from sparsekit.parameters import Mask, ParameterSpace


class Unstructured(Pattern):
    """Any weights of the whole space, by one global threshold."""

    name: ClassVar[str] = "unstructured"

    def count(self, space: ParameterSpace, sparsity: float) -> int:
        """round(s·n)."""
        return round(sparsity * space.size)

    def choose(self, scores: Tensor, mask: Mask, count: int, space: ParameterSpace) -> Tensor:
        """The kept weights with the lowest scores."""
        return lowest(scores, mask.kept, count - mask.removed_count)


class Uniform(Pattern):
    """The same fraction of every tensor, by a threshold for each."""

    name: ClassVar[str] = "uniform"

    def count(self, space: ParameterSpace, sparsity: float) -> int:
        """Σ over tensors of round(s·n_l)."""
        return sum(round(sparsity * info.size) for info in space.parameters)

    def choose(self, scores: Tensor, mask: Mask, count: int, space: ParameterSpace) -> Tensor:
        """The lowest scores of each tensor, shares rounded by largest remainder to `count` in all."""
        exact = [count * info.size / space.size for info in space.parameters]
        shares = [int(x) for x in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
        for i in by_remainder[: count - sum(shares)]:
            shares[i] += 1
        chosen = torch.zeros_like(mask.kept)
        for info, share in zip(space.parameters, shares, strict=True):
            kept = mask.kept[info.slice]
            removed = info.size - int(kept.count_nonzero())
            chosen[info.slice] = lowest(scores[info.slice], kept, max(share - removed, 0))
        return chosen


class NMSettings(Settings):
    """Settings of `n:m`."""

    n: int = Field(2, ge=1, description="weights that stay in each group")
    m: int = Field(4, ge=2, description="consecutive weights in a group")

    @model_validator(mode="after")
    def _fewer(self) -> NMSettings:
        if self.n >= self.m:
            raise ValueError(f"n:m keeps n of m weights, so n < m; {self.n}:{self.m} was given")
        return self


class NM(Pattern):
    """At most N weights stay in each group of M consecutive inputs of an output; short groups stay whole.

    On the way to the full pattern the lowest of the weights that may go are taken first.
    """

    name: ClassVar[str] = "n:m"
    Settings: ClassVar[type[Settings]] = NMSettings

    def _groups(self, space: ParameterSpace) -> list[tuple[int, int, int]]:
        """(start, rows, groups a row) of each tensor; a row is all inputs of one output."""
        shapes = [(info.start, info.shape[0], info.size // info.shape[0]) for info in space.parameters]
        return [(start, rows, width) for start, rows, width in shapes if width >= self.settings.m]

    def count(self, space: ParameterSpace, sparsity: float) -> int:
        """round(s·n), but no more than M − N of each whole group."""
        n, m = self.settings.n, self.settings.m
        most = sum(rows * (width // m) * (m - n) for _, rows, width in self._groups(space))
        wanted = round(sparsity * space.size)
        if sparsity > 1 - n / m + 1e-9:
            raise SettingsError(
                f"the pattern {n}:{m} removes at most {1 - n / m:.4g} of the weights, {sparsity} was asked for"
            )
        return min(wanted, most)

    def choose(self, scores: Tensor, mask: Mask, count: int, space: ParameterSpace) -> Tensor:
        """In each group the M − N lowest may go; of these, the lowest `count` in all do."""
        n, m = self.settings.n, self.settings.m
        ranked = torch.where(mask.kept, scores.double(), -torch.inf)  # what is gone stays gone
        may_go = torch.zeros_like(mask.kept)
        for start, rows, width in self._groups(space):
            used = width // m * m
            stretch = ranked[start : start + rows * width].view(rows, width)[:, :used].reshape(-1, m)
            order = stretch.argsort(dim=1, stable=True)[:, : m - n]
            flags = torch.zeros_like(stretch, dtype=torch.bool).scatter_(1, order, True).view(rows, used)
            may_go[start : start + rows * width].view(rows, width)[:, :used] = flags
        return lowest(scores, may_go & mask.kept, count - mask.removed_count)


def lowest(scores: Tensor, eligible: Tensor, count: int) -> Tensor:
    """(n,) bool: the `count` eligible entries with the lowest scores, ties by index."""
    chosen = torch.zeros_like(eligible)
    if count > 0:
        indices = eligible.nonzero()[:, 0]
        order = scores[indices].argsort(stable=True)
        chosen[indices[order[:count]]] = True
    return chosen
