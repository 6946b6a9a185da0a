"""Masks as files: read, written, counted, compared, and applied to weights of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from sparsekit.errors import ModelError, RecordError
from sparsekit.files import read_tensors, write_tensors
from sparsekit.runs.directory import MASK_METADATA

MEANING = MASK_METADATA["meaning"]


def read_mask(path: Path) -> dict[str, Tensor]:
    """The mask of a file, or of a run's directory.

    Returns:
        By parameter name a bool tensor of the parameter's shape, True = kept.

    Raises:
        RecordError: there is none, it is damaged, or it is no mask.
    """
    file = path / "mask.safetensors" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise RecordError(
            f"there is no mask.safetensors in '{path}'; a run writes it when it finishes: "
            "go on with the run by --resume, or give the directory of a finished one"
        )
    if not file.is_file():
        raise RecordError(f"there is no mask '{path}'; give a mask.safetensors or the directory of a finished run")
    try:
        kept, metadata = read_tensors(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise RecordError(
            f"'{file}' cannot be read as a mask ({error}); a safetensors file of bool tensors was needed: "
            "give the mask.safetensors of a run"
        ) from error
    _check(kept, f"'{file}'")
    if metadata.get("meaning") != MEANING:
        said = f"says '{metadata['meaning']}'" if "meaning" in metadata else "does not say what True means"
        raise RecordError(
            f"'{file}' {said}, a mask with the metadata 'meaning' = '{MEANING}' was needed; write it by "
            "sparsekit.runs.masks.write_mask"
        )
    return kept


def write_mask(path: Path, kept: Mapping[str, Tensor]) -> None:
    """Put a mask on disk, such as that of `sparsekit.prune`.

    Args:
        path: of the safetensors file; what is there is replaced.
        kept: by parameter name a bool tensor of the parameter's shape, True = kept.

    Raises:
        RecordError: it is no mask, or the disk refuses.
    """
    _check(kept, "what is to be written")
    write_tensors(path, kept, MASK_METADATA)


def _check(kept: Mapping[str, Tensor], source: str) -> None:
    if not kept:
        raise RecordError(f"{source} holds no tensor, a mask has one for each parameter; give the mask of a run")
    for name, tensor in kept.items():
        if tensor.dtype != torch.bool:
            raise RecordError(
                f"{source} is no mask: '{name}' is {tensor.dtype}, torch.bool was needed; "
                "give a mask.safetensors, not weights"
            )


@dataclass(frozen=True)
class Count:
    """How much a mask removes.

    Attributes:
        weights: how many there are.
        removed: how many of them are removed.
    """

    weights: int
    removed: int

    @property
    def sparsity(self) -> float:
        """The fraction removed, in [0, 1]; 0 of nothing."""
        return self.removed / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class TensorCount(Count):
    """How much a mask removes of one parameter.

    Attributes:
        shape: of the parameter.
        empty_rows: how many indices of the first dimension, the outputs of a linear or convolutional layer, have no
            weight left; None of a parameter of fewer than two dimensions.
        empty_columns: the same of the second dimension, the inputs, within a group where the layer has groups.
    """

    shape: tuple[int, ...]
    empty_rows: int | None
    empty_columns: int | None


def count(kept: Mapping[str, Tensor]) -> dict[str, TensorCount]:
    """What a mask removes, by parameter name."""
    return {
        name: TensorCount(
            weights=tensor.numel(),
            removed=_removed(tensor),
            shape=tuple(tensor.shape),
            empty_rows=_empty(tensor, 0) if tensor.dim() >= 2 else None,
            empty_columns=_empty(tensor, 1) if tensor.dim() >= 2 else None,
        )
        for name, tensor in kept.items()
    }


def total(counts: Iterable[Count]) -> Count:
    """All of them together."""
    counts = list(counts)
    return Count(sum(each.weights for each in counts), sum(each.removed for each in counts))


def _removed(kept: Tensor) -> int:
    return int(kept.numel() - kept.count_nonzero())


def _empty(kept: Tensor, dim: int) -> int:
    return _removed(kept.movedim(dim, 0).flatten(1).any(dim=1))


@dataclass(frozen=True)
class Overlap:
    """How far two masks A and B remove the same weights.

    Attributes:
        weights: how many there are.
        both: how many both remove.
        only_a: how many A alone removes.
        only_b: how many B alone removes.
        expected_both: how many both would remove in the mean if A and B were drawn at random, with as many removed in
            each parameter as are: Σ a b / n over the parameters, the mean of a hypergeometric distribution.
    """

    weights: int
    both: int
    only_a: int
    only_b: int
    expected_both: float

    @property
    def agreement(self) -> float:
        """Jaccard's index of the removed sets, |A ∩ B| / |A ∪ B|, in [0, 1]; 1 where neither removes anything."""
        return _jaccard(self.both, self.both + self.only_a, self.both + self.only_b)

    @property
    def expected_agreement(self) -> float:
        """The index of a random pair, about: of the mean intersection in place of the mean of the index."""
        return _jaccard(self.expected_both, self.both + self.only_a, self.both + self.only_b)


def _jaccard(both: float, a: int, b: int) -> float:
    union = a + b - both
    return both / union if union else 1.0


def overlaps(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Overlap]:
    """How far two masks of the same parameters agree, by parameter name, in the order of `a`.

    Raises:
        RecordError: they are of different parameters or shapes.
    """
    if set(a) != set(b):
        odd = ", ".join(sorted(set(a) ^ set(b)))
        raise RecordError(f"these masks are of different parameters, only one has: {odd}; give two of one network")
    for name, kept in a.items():
        if kept.shape != b[name].shape:
            raise RecordError(
                f"these masks are of different shapes: '{name}' has {tuple(kept.shape)} in the first, "
                f"{tuple(b[name].shape)} in the second; give two of one network"
            )
    return {name: _overlap(~kept, ~b[name]) for name, kept in a.items()}


def _overlap(a: Tensor, b: Tensor) -> Overlap:
    both, in_a, in_b = (int(each.count_nonzero()) for each in (a & b, a, b))
    return Overlap(a.numel(), both, in_a - both, in_b - both, in_a * in_b / max(a.numel(), 1))


def overlap_of(parts: Iterable[Overlap]) -> Overlap:
    """All of them together."""
    parts = list(parts)
    return Overlap(
        sum(part.weights for part in parts),
        sum(part.both for part in parts),
        sum(part.only_a for part in parts),
        sum(part.only_b for part in parts),
        sum(part.expected_both for part in parts),
    )


@dataclass(frozen=True)
class Applied:
    """Weights under a mask.

    Attributes:
        weights: the whole state dict; what the mask does not name is as it was.
        zeroed: how many weights were not zero before.
        already: how many of the removed weights were zero before.
        tied: name of a tensor that the mask does not name -> the parameter whose values it had, and has.
    """

    weights: dict[str, Tensor]
    zeroed: int
    already: int
    tied: dict[str, str]


def apply_mask(kept: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Applied:
    """Weights with the removed ones set to zero; the tensors that are given stay as they are.

    A mask names a tied parameter once, a state dict holds it under each of its names, and a file may have two
    copies of it. What has all the values of a masked parameter, and not one value only, follows it: otherwise
    loading the second copy would bring the removed weights back.

    Args:
        kept: by parameter name a bool tensor, True = kept.
        weights: a state dict; its names may have the prefix `module.` of data-parallel training.

    Raises:
        ModelError: the weights lack one of the parameters, have another shape, or are no plain tensors.
    """
    for name, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.dtype == torch.complex128:
            raise ModelError(
                f"'{name}' cannot be kept as safetensors; give dense tensors, unquantised, of real numbers"
            )
    places = {name: _place(name, tensor, weights) for name, tensor in kept.items()}
    others = [name for name in weights if name not in places.values()]
    out, tied = dict(weights), dict[str, str]()
    zeroed = already = 0
    for name, place in places.items():
        dense, removed = weights[place], ~kept[name]
        out[place] = _zeroed(dense, removed)
        zeroed += int((removed & (dense != 0)).count_nonzero())
        already += int((removed & (dense == 0)).count_nonzero())
        for other in others:
            if _same(weights[other], dense):
                out[other], tied[other] = out[place], place
    return Applied(out, zeroed, already, tied)


def _place(name: str, kept: Tensor, weights: Mapping[str, Tensor]) -> str:
    place = name if name in weights else f"module.{name}"
    if place not in weights:
        some = ", ".join(list(weights)[:5])
        raise ModelError(
            f"the weights have no '{name}', which the mask has; their first names are {some}; "
            "give weights of the network that the mask is of"
        )
    if weights[place].shape != kept.shape:
        raise ModelError(
            f"'{place}' has shape {tuple(weights[place].shape)} in the weights, {tuple(kept.shape)} in the mask; "
            "give weights of the network that the mask is of"
        )
    return place


def _zeroed(dense: Tensor, removed: Tensor) -> Tensor:
    # By bytes, all of which are zero in the zero of every type: some types know no masked_fill.
    out = dense.detach().clone(memory_format=torch.contiguous_format)
    out.unsqueeze(-1).view(torch.uint8).masked_fill_(removed.unsqueeze(-1), 0)
    return out


def _same(tensor: Tensor, dense: Tensor) -> bool:
    """Whether a tensor is another name of a parameter, or a copy; equal constants are neither."""
    if tensor.shape != dense.shape or tensor.dtype != dense.dtype or not dense.numel():
        return False
    return torch.equal(tensor, dense) and not bool((dense == dense.reshape(-1)[0]).all())
