"""Mask files: reading, writing, counting, comparing, and applying them to other weights."""

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
        Parameter name -> bool tensor of the parameter's shape, True = kept.

    Raises:
        RecordError: there is no file, it is damaged, or it is not a mask.
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
    """Write a mask, such as that of `sparsekit.prune`, to a file.

    Args:
        path: of the safetensors file; an existing file is replaced.
        kept: parameter name -> bool tensor of the parameter's shape, True = kept.

    Raises:
        RecordError: it is not a mask, or the file cannot be written.
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
    """The number of weights that a mask removes.

    Attributes:
        weights: number of all weights.
        removed: number of removed weights.
    """

    weights: int
    removed: int

    @property
    def sparsity(self) -> float:
        """The fraction removed, in [0, 1]; 0 without weights."""
        return self.removed / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class TensorCount(Count):
    """The number of weights that a mask removes from one parameter.

    Attributes:
        shape: of the parameter.
        empty_rows: number of indices of the first dimension, the outputs of a linear or convolutional layer, without
            kept weights; None for a parameter of fewer than two dimensions.
        empty_columns: the same for the second dimension, the inputs, within a group where the layer has groups.
    """

    shape: tuple[int, ...]
    empty_rows: int | None
    empty_columns: int | None


def count(kept: Mapping[str, Tensor]) -> dict[str, TensorCount]:
    """Parameter name -> the number of weights that a mask removes."""
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
    """The sum of counts."""
    counts = list(counts)
    return Count(sum(each.weights for each in counts), sum(each.removed for each in counts))


def _removed(kept: Tensor) -> int:
    return int(kept.numel() - kept.count_nonzero())


def _empty(kept: Tensor, dim: int) -> int:
    return _removed(kept.movedim(dim, 0).flatten(1).any(dim=1))


@dataclass(frozen=True)
class Overlap:
    """The overlap of the weights that two masks A and B remove.

    Attributes:
        weights: number of all weights.
        both: number that both remove.
        only_a: number that only A removes.
        only_b: number that only B removes.
        expected_both: mean number that both would remove if A and B were drawn at random, with the same numbers removed
            from each parameter: Σ a b / n over the parameters, the mean of a hypergeometric distribution.
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
        """Approximately the mean index of a random pair: the index of the mean intersection."""
        return _jaccard(self.expected_both, self.both + self.only_a, self.both + self.only_b)


def _jaccard(both: float, a: int, b: int) -> float:
    union = a + b - both
    return both / union if union else 1.0


def overlaps(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Overlap]:
    """Parameter name -> the overlap of two masks of the same parameters, in the order of `a`.

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
    """The sum of overlaps."""
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
    """Weights to which a mask was applied.

    Attributes:
        weights: the whole state dict; tensors that the mask does not name are unchanged, unless they are tied.
        zeroed: number of removed weights that were not zero before.
        already: number of removed weights that were zero before.
        tied: name of a tensor that the mask does not name -> the parameter whose values it had before and has now.
    """

    weights: dict[str, Tensor]
    zeroed: int
    already: int
    tied: dict[str, str]


def apply_mask(kept: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Applied:
    """Weights with the removed ones set to zero; the given tensors are not changed.

    A mask names a tied parameter once, a state dict holds it under each of its names, and a file may have two
    copies of it. A tensor that is equal to a masked parameter, and not constant, is masked too: otherwise loading
    the second copy would restore the removed weights.

    Args:
        kept: parameter name -> bool tensor, True = kept.
        weights: a state dict; its names may have the prefix `module.` of data-parallel training.

    Raises:
        ModelError: the weights lack a parameter, have another shape, or are not plain tensors.
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
    # By bytes, because some types have no masked_fill; in every type all bytes of zero are zero.
    out = dense.detach().clone(memory_format=torch.contiguous_format)
    out.unsqueeze(-1).view(torch.uint8).masked_fill_(removed.unsqueeze(-1), 0)
    return out


def _same(tensor: Tensor, dense: Tensor) -> bool:
    """Whether a tensor is a parameter under another name or a copy of it; equal constants are not."""
    if tensor.shape != dense.shape or tensor.dtype != dense.dtype or not dense.numel():
        return False
    return torch.equal(tensor, dense) and not bool((dense == dense.reshape(-1)[0]).all())
