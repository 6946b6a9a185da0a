"""The built-in patterns: which sets of weights may be removed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sparsekit.errors import SettingsError
from sparsekit.methods.interfaces import Pattern, Settings, Units
from sparsekit.problem.groups import Axis, groups_of
from sparsekit.problem.parameters import Mask, ParameterInfo, ParameterSpace


class FloorSettings(Settings):
    """Settings of the patterns that could remove all weights of a tensor."""

    # At 0.2 a small last layer keeps enough weights, and up to 95 % sparsity ordinary cuts rarely reach the floor.
    floor: float = Field(
        0.2,
        ge=0,
        le=1,
        description="the fraction that always stays of what an even cut would leave of a tensor; 0: it may go whole",
    )


class Unstructured(Pattern):
    """Any weights of the whole space, by one global threshold, but no tensor falls below its floor.

    The floor is relative to an even cut: at sparsity s a tensor of n_l weights keeps `floor` · (1 − s) · n_l of them,
    rounded up, those with the highest scores. So every sparsity can be reached. Weights from earlier cuts stay removed.
    """

    name: ClassVar[str] = "unstructured"
    Settings: ClassVar[type[Settings]] = FloorSettings

    def count(self, space: ParameterSpace, sparsity: float) -> int:
        """round(s·n)."""
        return round(sparsity * space.size)

    def choose(self, scores: Tensor, mask: Mask, count: int, space: ParameterSpace) -> Tensor:
        """The kept weights with the lowest scores, above the tensors' floors."""
        sizes = [info.size for info in space.parameters]
        least = floors(sizes, space.size - count, _floor(self.settings))
        return lowest_above(scores, mask.kept, count - mask.removed_count, sizes, least)


class Uniform(Pattern):
    """The same fraction of every tensor, by a threshold for each.

    The floor, see `unstructured`, has one effect only: tensors of a few weights keep one of them.
    """

    name: ClassVar[str] = "uniform"
    across_layers: ClassVar[bool] = False
    Settings: ClassVar[type[Settings]] = FloorSettings

    def count(self, space: ParameterSpace, sparsity: float) -> int:
        """Σ over tensors of round(s·n_l)."""
        return sum(round(sparsity * info.size) for info in space.parameters)

    def choose(self, scores: Tensor, mask: Mask, count: int, space: ParameterSpace) -> Tensor:
        """The lowest scores of each tensor, shares rounded by largest remainder to `count` in all.

        Where more than its share of a tensor is removed already, the others lose fewer.
        """
        sizes = {info: info.size for info in space.parameters}
        least = floors(list(sizes.values()), space.size - count, _floor(self.settings))
        most = {info: info.size - stay for info, stay in zip(sizes, least, strict=True)}
        return _lowest_of_each(scores, mask.kept, mask, count, sizes, most)


def _lowest_of_each(
    scores: Tensor,
    eligible: Tensor,
    mask: Mask,
    count: int,
    sizes: Mapping[ParameterInfo, int],
    most: Mapping[ParameterInfo, int],
) -> Tensor:
    """The lowest eligible scores of each tensor, so that `count` weights are removed in all, in proportion to `sizes`.

    Where a share is more than the `most` that may be removed from a tensor, the tensors with most room take the rest.
    """
    removed = {info: int(mask.removed[info.slice].count_nonzero()) for info in sizes}
    shares = dict(removed)
    below = [info for info in sizes if sizes[info]]
    while below:
        # By rounding, a tensor's share of a larger count may be smaller than the number removed before.
        left = count - sum(removed.values()) + sum(removed[info] for info in below)
        parts = dict(zip(below, _proportional(left, [sizes[info] for info in below]), strict=True))
        past = [info for info in below if parts[info] < removed[info]]
        if not past:
            shares |= parts
            break
        below = [info for info in below if info not in past]
    room = {info: max(most[info], removed[info]) - share for info, share in shares.items()}
    over = -sum(min(0, left) for left in room.values())
    for info in sorted(room, key=lambda info: -room[info]):
        more = min(over, room[info])  # below zero: the excess of this tensor
        shares[info] += more
        over -= max(0, more)
    chosen = torch.zeros_like(mask.kept)
    for info, share in shares.items():
        chosen[info.slice] = lowest(scores[info.slice], eligible[info.slice], share - removed[info])
    return chosen


def _proportional(count: int, sizes: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to `sizes` that sum to `count`, rounded by largest remainder, ties by index."""
    whole, rest = zip(*(divmod(count * size, sum(sizes)) for size in sizes), strict=True)
    first = sorted(range(len(sizes)), key=lambda i: -rest[i])[: count - sum(whole)]
    return [w + (i in first) for i, w in enumerate(whole)]


#: Description of the setting `axis`.
ALONG = "inputs: groups run along the input channels of an output; memory: along the tensor as it is stored"


class NMSettings(Settings):
    """Settings of `n:m`."""

    n: int = Field(2, ge=1, description="weights that stay in each group")
    m: int = Field(4, ge=2, description="neighbouring weights in a group")
    axis: Axis = Field("inputs", description=ALONG)

    @model_validator(mode="after")
    def _fewer(self) -> NMSettings:
        if self.n >= self.m:
            raise ValueError(f"n:m keeps n of m weights, so n < m; {self.n}:{self.m} was given")
        return self


class NM(Pattern):
    """At most N weights stay in each group of M consecutive inputs of an output; short groups stay whole.

    Groups run along the dimension that a product sums over, as kernels for 2:4 need (sparse tensor cores, cuSPARSELt
    and torch's SparseSemiStructuredTensor: along `in` of a linear layer's (out, in), where `in` is a multiple that the
    kernel asks for). In a convolution a group is M input channels at one place of the kernel, because kernels compute
    it as a product over (place, channel), channels last; a convolution with fewer than M input channels in each of its
    groups has none. For other layers see `sparsekit.problem.groups.inputs_of_outputs`. `axis=memory` takes neighbours
    in memory instead, in a convolution across places of the kernel, as in most published results; kernels can use that
    for 1 × 1 convolutions only.

    Before the pattern is complete, the lowest of the weights that may be removed are removed first, from each tensor in
    proportion to their number: scores are compared within a tensor only, at every step.
    """

    name: ClassVar[str] = "n:m"
    across_layers: ClassVar[bool] = False
    Settings: ClassVar[type[Settings]] = NMSettings

    def units(self, space: ParameterSpace) -> Units:
        """M consecutive inputs of an output; M − N of them are removed."""
        return Units(groups_of(space, self.settings.m, self.settings.axis), self.settings.m - self.settings.n)

    def count(self, space: ParameterSpace, sparsity: float) -> int:
        """round(s·n), but no more than M − N of each whole group.

        Raises:
            SettingsError: more than M − N of M is asked for, or there is no whole group.
        """
        n, m = self.settings.n, self.settings.m
        units = self.units(space)
        most = len(units.index) * units.removed
        wanted = round(sparsity * space.size)
        if sparsity > 0 and not most:
            raise SettingsError(
                f"no tensor has {m} inputs to an output, so the pattern {n}:{m} has no group of {m} to remove from"
            )
        if sparsity > 1 - n / m + 1e-9:
            raise SettingsError(
                f"the pattern {n}:{m} removes at most {1 - n / m:.4g} of the weights, {sparsity} was asked for"
            )
        return min(wanted, most)

    def choose(self, scores: Tensor, mask: Mask, count: int, space: ParameterSpace) -> Tensor:
        """In each group the M − N lowest may be removed; of these, the lowest of each tensor are, `count` in all."""
        units = self.units(space)
        index = units.index.to(scores.device)
        ranked = torch.where(mask.kept, scores.double(), -torch.inf)  # removed weights stay removed
        order = ranked[index].argsort(dim=1, stable=True)[:, : units.removed]
        may_go = torch.zeros_like(mask.kept)
        may_go[index.gather(1, order)] = True
        most = {info: int(may_go[info.slice].count_nonzero()) for info in space.parameters}
        return _lowest_of_each(scores, may_go & mask.kept, mask, count, most, most)


class BlockSettings(FloorSettings):
    """Settings of `block`."""

    size: int = Field(4, ge=2, description="neighbouring weights that go together")
    axis: Axis = Field("inputs", description=ALONG)


class Block(Pattern):
    """Whole blocks of consecutive inputs of an output are removed or kept; short blocks are kept.

    A block's score is the sum of its weights' scores. Blocks run along the input channels of an output at one place of
    the kernel, or as `axis` says, see `n:m`. Floors, see `unstructured`, are counted in whole blocks.
    """

    name: ClassVar[str] = "block"
    Settings: ClassVar[type[Settings]] = BlockSettings

    def units(self, space: ParameterSpace) -> Units:
        """`size` consecutive inputs of an output; all of them are removed."""
        return Units(groups_of(space, self.settings.size, self.settings.axis), self.settings.size)

    def count(self, space: ParameterSpace, sparsity: float) -> int:
        """s·n to the nearest whole block, but no more blocks than there are."""
        size = self.settings.size
        blocks = len(self.units(space).index)
        if sparsity > 0 and not blocks:
            raise SettingsError(f"no tensor has {size} inputs to an output, so there is no block of {size} to remove")
        return size * min(round(sparsity * space.size / size), blocks)

    def choose(self, scores: Tensor, mask: Mask, count: int, space: ParameterSpace) -> Tensor:
        """The whole blocks with the lowest sums."""
        size = self.settings.size
        index = self.units(space).index.to(scores.device)
        sums = scores.double()[index].sum(1)
        whole, more = mask.kept[index].all(1), (count - mask.removed_count) // size
        sizes = [int(((index[:, 0] >= t.start) & (index[:, 0] < t.start + t.size)).sum()) for t in space.parameters]
        least = floors(sizes, int(whole.count_nonzero()) - more, self.settings.floor)
        chosen = torch.zeros_like(mask.kept)
        chosen[index[lowest_above(sums, whole, more, sizes, least)]] = True
        return chosen


def floors(sizes: Sequence[int], left: int, fraction: float) -> list[int]:
    """The least number to keep of each tensor where `left` are kept in all: a fraction of an even share, rounded up.

    They are rounded down where their sum would otherwise exceed `left`.
    """
    even = [fraction * left * size / max(sum(sizes), 1) for size in sizes]
    up = [ceil(share) for share in even]
    return up if sum(up) <= left else [floor(share) for share in even]


def lowest_above(scores: Tensor, kept: Tensor, count: int, sizes: Sequence[int], least: Sequence[int]) -> Tensor:
    """As `lowest`, but at least `least` entries stay of consecutive stretches of `sizes`; one with fewer loses none."""
    chosen = lowest(scores, kept, count)
    lost, before = ([int(part.count_nonzero()) for part in x.split(list(sizes))] for x in (chosen, kept))
    if not any(gone and had - gone < stay for gone, had, stay in zip(lost, before, least, strict=True)):
        return chosen
    parts = zip(scores.split(list(sizes)), kept.split(list(sizes)), before, least, strict=True)
    may_go = torch.cat([lowest(some, here, had - stay) for some, here, had, stay in parts])
    return lowest(scores, may_go, count)


def _floor(settings: Settings | None) -> float:
    """The floor; 0 for a pattern without settings, or with settings that have none."""
    return float(getattr(settings, "floor", 0.0))


def lowest(scores: Tensor, eligible: Tensor, count: int) -> Tensor:
    """(n,) bool: the `count` eligible entries with the lowest scores, ties by index."""
    chosen = torch.zeros_like(eligible)
    if count > 0:
        indices = eligible.nonzero()[:, 0]
        order = scores[indices].argsort(stable=True)
        chosen[indices[order[:count]]] = True
    return chosen
