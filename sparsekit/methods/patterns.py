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

    # At 0.2 a small last layer keeps what it needs, and at up to 95 % ordinary cuts mostly stay above by themselves.
    floor: float = Field(
        0.2,
        ge=0,
        le=1,
        description="the fraction that always stays of what an even cut would leave of a tensor; 0: it may go whole",
    )


class Unstructured(Pattern):
    """Any weights of the whole space, by one global threshold, but no tensor falls below its floor.

    The floor is relative to an even cut: at sparsity s a tensor of n_l weights keeps `floor` · (1 − s) · n_l of them,
    rounded up, those with the highest scores. So it contradicts no sparsity. What earlier cuts took stays gone.
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

    The floor, see `unstructured`, says no more than that tensors of a few weights keep one of them.
    """

    name: ClassVar[str] = "uniform"
    across_layers: ClassVar[bool] = False
    Settings: ClassVar[type[Settings]] = FloorSettings

    def count(self, space: ParameterSpace, sparsity: float) -> int:
        """Σ over tensors of round(s·n_l)."""
        return sum(round(sparsity * info.size) for info in space.parameters)

    def choose(self, scores: Tensor, mask: Mask, count: int, space: ParameterSpace) -> Tensor:
        """The lowest scores of each tensor, shares rounded by largest remainder to `count` in all.

        A tensor that is past its share gives nothing back, and the others have so much less to lose.
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
    """The lowest eligible scores of each tensor, so that `count` weights are gone in all, in proportion to `sizes`.

    Where a share is more than the `most` that may be gone of a tensor, those with the most to give take the rest.
    """
    removed = {info: int(mask.removed[info.slice].count_nonzero()) for info in sizes}
    shares = dict(removed)
    below = [info for info in sizes if sizes[info]]
    while below:
        # Rounding may give a tensor less of a larger count, so that what is gone may exceed its share.
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
        more = min(over, room[info])  # below zero: what is over here
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


#: What `axis` says.
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

    Groups run along the dimension that a product sums over, which is what kernels for 2:4 need (sparse tensor cores,
    cuSPARSELt and torch's SparseSemiStructuredTensor: along `in` of a linear layer's (out, in), with `in` a multiple of
    what the kernel asks for). Of a convolution it is M input channels at one place of the kernel, as it becomes a
    product over (place, channel), channels last; one with fewer than M input channels a group has none. For other
    layers see `sparsekit.problem.groups.inputs_of_outputs`. `axis=memory` takes neighbours in memory instead, of a
    convolution across places of the kernel, as published results mostly do; no kernel profits from it but for 1 × 1.

    On the way to the full pattern the lowest of the weights that may go are taken first, from each tensor in
    proportion to how many may: scores are compared within a tensor only, all the way.
    """

    name: ClassVar[str] = "n:m"
    across_layers: ClassVar[bool] = False
    Settings: ClassVar[type[Settings]] = NMSettings

    def units(self, space: ParameterSpace) -> Units:
        """M consecutive inputs of an output; M − N of them go."""
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
        """In each group the M − N lowest may go; of these, the lowest of each tensor do, `count` in all."""
        units = self.units(space)
        index = units.index.to(scores.device)
        ranked = torch.where(mask.kept, scores.double(), -torch.inf)  # what is gone stays gone
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
    """Whole blocks of consecutive inputs of an output go or stay; short blocks stay.

    A block's score is the sum of its weights' scores. Blocks run along the input channels of an output at one place of
    the kernel, or as `axis` says, see `n:m`. Floors, see `unstructured`, are counted in whole blocks.
    """

    name: ClassVar[str] = "block"
    Settings: ClassVar[type[Settings]] = BlockSettings

    def units(self, space: ParameterSpace) -> Units:
        """`size` consecutive inputs of an output; all of them go."""
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
    """How many of each tensor stay at least where `left` of all do: a fraction of its even share, rounded up.

    Rounded down where `left` are too few for that, so that they never are more than `left` in all.
    """
    even = [fraction * left * size / max(sum(sizes), 1) for size in sizes]
    up = [ceil(share) for share in even]
    return up if sum(up) <= left else [floor(share) for share in even]


def lowest_above(scores: Tensor, kept: Tensor, count: int, sizes: Sequence[int], least: Sequence[int]) -> Tensor:
    """`lowest`, but of consecutive stretches of `sizes` entries no fewer than `least` stay; one below it loses none."""
    chosen = lowest(scores, kept, count)
    lost, before = ([int(part.count_nonzero()) for part in x.split(list(sizes))] for x in (chosen, kept))
    if not any(gone and had - gone < stay for gone, had, stay in zip(lost, before, least, strict=True)):
        return chosen
    parts = zip(scores.split(list(sizes)), kept.split(list(sizes)), before, least, strict=True)
    may_go = torch.cat([lowest(some, here, had - stay) for some, here, had, stay in parts])
    return lowest(scores, may_go, count)


def _floor(settings: Settings | None) -> float:
    """None where a pattern is made without settings, or with those of a class of its own."""
    return float(getattr(settings, "floor", 0.0))


def lowest(scores: Tensor, eligible: Tensor, count: int) -> Tensor:
    """(n,) bool: the `count` eligible entries with the lowest scores, ties by index."""
    chosen = torch.zeros_like(eligible)
    if count > 0:
        indices = eligible.nonzero()[:, 0]
        order = scores[indices].argsort(stable=True)
        chosen[indices[order[:count]]] = True
    return chosen
