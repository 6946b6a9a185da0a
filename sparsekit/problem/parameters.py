"""The prunable weights as one flat vector, and the mask of those that are kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from sparsekit.errors import ModelError
from sparsekit.problem.networks import check_kind


@dataclass(frozen=True)
class ParameterInfo:
    """One prunable tensor and its place in the flat vector.

    Attributes:
        layer: the class of its module, the first one where it is tied; None where unknown.
        groups: that module's `groups`, 1 where it has none: parts of its outputs that see different inputs.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    layer: type[nn.Module] | None = field(default=None, compare=False)
    groups: int = field(default=1, compare=False)

    @property
    def size(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def slice(self) -> slice:
        """Where the tensor lies in the flat vector."""
        return slice(self.start, self.start + self.size)


class ParameterSpace:
    """The prunable tensors of a model as one flat vector, in the order of `named_parameters`.

    Only this class knows how tensors and the flat vector w ∈ Rⁿ correspond. It holds names and shapes,
    but neither model nor values.

    Attributes:
        parameters: the tensors, in flat order.
        skipped: name -> why the parameter is not pruned.
        size: n, the number of prunable weights.
        total: the number of all parameters of the model, prunable or not.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        *,
        skipped: Mapping[str, str] | None = None,
        total: int | None = None,
        owners: Mapping[str, nn.Module] | None = None,
    ) -> None:
        infos, start = [], 0
        for name, shape in shapes.items():
            owner = (owners or {}).get(name)
            groups = getattr(owner, "groups", 1)
            layer = None if owner is None else type(owner)
            infos.append(ParameterInfo(name, tuple(shape), start, layer, groups if isinstance(groups, int) else 1))
            start += infos[-1].size
        self.parameters: tuple[ParameterInfo, ...] = tuple(infos)
        self.size = start
        self.skipped = dict(skipped or {})
        self.total = start if total is None else total
        self._by_name = {info.name: info for info in infos}

    @classmethod
    def of(
        cls, model: nn.Module, *, include: Iterable[str] | None = None, exclude: Iterable[str] = ()
    ) -> ParameterSpace:
        """The prunable parameters of a model.

        Args:
            model: any module; a parameter used in several places (tied) counts once, under its first name.
            include: names of parameters, or shell patterns on them (`layer3.*`); without it, every floating-point
                parameter of two or more dimensions that is not frozen, has `weight` or `kernel` in its name and
                belongs to no normalisation: the weights that layers multiply by, not biases, scales, tokens or tables.
            exclude: the same; takes precedence over `include`.

        Raises:
            ModelError: nothing is left to prune, a pattern matches no parameter, or a weight is computed from others
                at each call (weight_norm, spectral_norm, parametrizations, torch.nn.utils.prune).
        """
        check_kind(model)
        named = dict(model.named_parameters())
        normalised = {
            f"{name}.{own}" if name else own
            for name, module in model.named_modules()
            if isinstance(module, NORMALISATION)
            for own, _ in module.named_parameters(recurse=False)
        }
        include = None if include is None else tuple(include)
        exclude = tuple(exclude)
        for pattern in (*(include or ()), *exclude):
            if not any(_matches(name, pattern) for name in named):
                raise ModelError(
                    f"the pattern '{pattern}' matches no parameter; "
                    f"the model has: {', '.join(named) or 'no parameters'}"
                )
        shapes, skipped = {}, {}
        for name, tensor in named.items():
            reason = _why_skipped(name, tensor, include, exclude, name in normalised)
            if reason is None:
                shapes[name] = tuple(tensor.shape)
            else:
                skipped[name] = reason
        if not shapes:
            reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items()) or "it has no parameters"
            raise ModelError(f"the model has no prunable parameter ({reasons}); include some by name")
        for prefix, advice in _computed(model):
            # by default such parameters are skipped by their names
            asked = (name for name in named if name in shapes or skipped[name] == NOT_MULTIPLIED)
            found = next((name for name in asked if name.startswith(prefix)), None)
            if found is not None:
                raise ModelError(
                    f"'{found}' is what a weight is computed from at each call, so that zeros in it are none in the "
                    f"weight: {advice} first, or exclude it"
                )
        owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in shapes}
        return cls(shapes, skipped=skipped, total=sum(t.numel() for t in named.values()), owners=owners)

    def without(self, reasons: Mapping[str, str]) -> ParameterSpace:
        """The space without some of its tensors, given as name -> why it is skipped; itself if there are none."""
        if not reasons:
            return self
        rest = [info for info in self.parameters if info.name not in reasons]
        out = ParameterSpace(
            {info.name: info.shape for info in rest}, skipped={**self.skipped, **reasons}, total=self.total
        )
        out.parameters = tuple(replace(old, start=new.start) for old, new in zip(rest, out.parameters, strict=True))
        out._by_name = {info.name: info for info in out.parameters}
        return out

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, name: str) -> ParameterInfo:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParameterSpace) and self.parameters == other.parameters

    def __hash__(self) -> int:
        return hash(self.parameters)

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in flat order."""
        return tuple(info.name for info in self.parameters)

    def stretches(self, block_size: int | None, *, across_tensors: bool = False) -> list[int]:
        """Lengths of consecutive stretches of `block_size` weights in flat order; the last one may be shorter.

        Args:
            block_size: None for the longest possible stretches.
            across_tensors: over the whole vector; otherwise no stretch crosses a tensor's end.
        """
        out = []
        for size in [self.size] if across_tensors else [info.size for info in self.parameters]:
            whole, rest = divmod(size, block_size or size)
            out += [block_size or size] * whole + [rest] * (rest > 0)
        return out

    def tensors(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's own prunable parameters, by name.

        Raises:
            ModelError: the model lacks one of them, or its shape differs.
        """
        named = dict(model.named_parameters())
        for info in self.parameters:
            found = named.get(info.name)
            if found is None or tuple(found.shape) != info.shape:
                what = "is missing" if found is None else f"has shape {tuple(found.shape)}"
                raise ModelError(f"parameter '{info.name}' of shape {info.shape} was expected; it {what}")
        return {info.name: named[info.name] for info in self.parameters}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors by name -> one vector (n,)."""
        return torch.cat([tensors[info.name].reshape(-1) for info in self.parameters])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector (n,) -> views of it by name, in the parameters' shapes."""
        self.check(vector)
        return {info.name: vector[info.slice].view(info.shape) for info in self.parameters}

    def unflatten_rows(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows (b, n) -> views of them by name, (b, *shape)."""
        return {info.name: rows[:, info.slice].view(len(rows), *info.shape) for info in self.parameters}

    def check(self, vector: Tensor) -> None:
        """Raise a ValueError for a vector that is not of this space."""
        if vector.shape != (self.size,):
            raise ValueError(f"a vector of shape ({self.size},) was needed, {tuple(vector.shape)} was given")

    def read(self, model: nn.Module) -> Tensor:
        """A copy of the model's prunable weights, (n,)."""
        return self.flatten({name: p.detach() for name, p in self.tensors(model).items()})

    @torch.no_grad()
    def write(self, model: nn.Module, weights: Tensor) -> None:
        """Set the model's prunable weights from (n,), in place."""
        parts = self.unflatten(weights)
        for name, parameter in self.tensors(model).items():
            parameter.copy_(parts[name])


def _matches(name: str, pattern: str) -> bool:
    """Whether the pattern is the name itself, which may contain brackets, or a shell pattern that matches it."""
    return name == pattern or fnmatchcase(name, pattern)


def _why_skipped(
    name: str, tensor: Tensor, include: tuple[str, ...] | None, exclude: tuple[str, ...], normalisation: bool
) -> str | None:
    multiplied = any(word in name.rpartition(".")[2].lower() for word in MULTIPLIED)
    reasons = {
        "excluded by name": any(_matches(name, pattern) for pattern in exclude),
        f"not floating point ({tensor.dtype})": not tensor.is_floating_point(),
        "it has no entries": not tensor.numel(),
    }
    if include is not None:
        reasons["not included by name"] = not any(_matches(name, pattern) for pattern in include)
    else:
        reasons |= {
            "frozen (requires_grad=False)": not tensor.requires_grad,
            "fewer than two dimensions (bias or normalisation)": tensor.dim() < 2,
            "normalisation": normalisation,
            NOT_MULTIPLIED: not multiplied,
        }
    return next((reason for reason, holds in reasons.items() if holds), None)


#: Reason for skipping a parameter that no layer is known to multiply by.
NOT_MULTIPLIED = "no layer's weight by its name (a scale, a token or a table); include it to prune it"

#: Modules whose parameters are scales, whatever their shape.
NORMALISATION = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)

#: Parts of the names of parameters that layers multiply their inputs by.
MULTIPLIED = ("weight", "kernel")


def _computed(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Prefixes of the names of parameters from which weights are computed, each with the call that undoes it."""
    for name, module in model.named_modules():
        own = f"{name}." if name else ""
        if parametrize.is_parametrized(module):
            assert isinstance(module.parametrizations, nn.ModuleDict)
            for tensor in module.parametrizations:
                advice = f"call torch.nn.utils.parametrize.remove_parametrizations(layer, '{tensor}')"
                yield f"{own}parametrizations.{tensor}.", advice
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                yield f"{own}{hook.name}_", "call torch.nn.utils.remove_weight_norm(layer)"
            elif isinstance(hook, SpectralNorm):
                yield f"{own}{hook.name}_orig", "call torch.nn.utils.remove_spectral_norm(layer)"


@dataclass(frozen=True, eq=False)
class Mask:
    """Which weights of a space are kept: `kept` (n,) bool, True = kept. Immutable.

    A mask is explicit: a weight that happens to be zero is not removed, and only the mask marks a weight as removed.
    """

    kept: Tensor

    def __post_init__(self) -> None:
        if self.kept.dtype != torch.bool or self.kept.dim() != 1:
            raise ValueError(f"a mask is a bool vector, {self.kept.dtype} of shape {tuple(self.kept.shape)} given")

    @classmethod
    def full(cls, size: int, device: torch.device | str | None = None) -> Self:
        """The mask that keeps all `size` weights."""
        return cls(torch.ones(size, dtype=torch.bool, device=device))

    @property
    def removed(self) -> Tensor:
        """(n,) bool, True = removed."""
        return ~self.kept

    @property
    def removed_count(self) -> int:
        """The number of removed weights."""
        return int(self.kept.numel() - self.kept.count_nonzero())

    @property
    def sparsity(self) -> float:
        """The fraction removed, in [0, 1]."""
        return self.removed_count / self.kept.numel()

    def without(self, chosen: Tensor) -> Mask:
        """This mask without the weights where `chosen` (n,) bool is True."""
        return Mask(self.kept & ~chosen)

    @torch.no_grad()
    def apply(self, space: ParameterSpace, model: nn.Module) -> None:
        """Set the removed weights of the model to zero, in place."""
        for name, parameter in space.tensors(model).items():
            kept = self.kept[space[name].slice].view(parameter.shape)
            parameter.masked_fill_(~kept.to(parameter.device), 0.0)
