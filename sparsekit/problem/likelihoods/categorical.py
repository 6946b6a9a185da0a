"""Cross-entropy over classes, with class weights, ignored targets, label smoothing and soft labels as in torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparsekit.errors import DataError, SettingsError
from sparsekit.problem.likelihoods.base import Likelihood, Reduction, one_position_at_a_time, signs


class _Extent(NamedTuple):
    """Of labels: the least and the greatest that count (with none: a least above the greatest), and whether all do."""

    least: int
    most: int
    all_kept: bool


#: Labels -> (their version and the ignored label, what was read): each read makes an accelerator's host wait.
_EXTENTS = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Cross-entropy of logits (N, C) or (N, C, …) with targets (N,) or (N, …) of class indices.

    Targets may also be soft: of the logits' shape, a distribution over the classes at each position. The mean over a
    batch is torch's: over positions that are not ignored, class weights divided by the sum of those of the targets.

    Attributes:
        reduction: the mean over the positions of all examples, or the sum over those of one.
        weight: of each class, (C,); a tensor or any sequence of numbers is accepted.
        ignore_index: the target of positions that do not count.
        label_smoothing: ε; targets become (1 − ε) of themselves plus ε/C for every class.

    Raises:
        SettingsError: a weight is negative or not finite, or ε is not in [0, 1].
        DataError: at use, if the targets are not valid labels for the outputs.
    """

    reduction: Reduction = "mean"
    weight: tuple[float, ...] | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    name = "categorical"

    def __post_init__(self) -> None:
        if self.weight is not None:  # kept as numbers, because a tensor can be neither compared nor hashed
            given = tuple(float(w) for w in self.weight)
            object.__setattr__(self, "weight", given)
            if not (given and all(0 <= w < math.inf for w in given) and sum(given) > 0):
                raise SettingsError(f"class weights of {given} were given; finite numbers, none negative, are needed")
        if not 0 <= self.label_smoothing <= 1:
            raise SettingsError(f"a label smoothing of {self.label_smoothing} was given; it lies between 0 and 1")

    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        labels = self._labels(target, output)
        values = F.cross_entropy(
            output,
            labels,
            weight=None if self.weight is None else output.new_tensor(self.weight),
            ignore_index=-100 if labels.is_floating_point() else self.ignore_index,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        ratio = self._ratio(labels)
        return (values if ratio == 1 else values * ratio).unsqueeze(-1)

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        probabilities = output.detach().movedim(1, -1).double().softmax(-1)  # (N, …, C)
        shape = (*probabilities.shape[:-1], 1)
        uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
        below = probabilities.cumsum(-1) < uniform.to(output.device)
        return below.sum(-1).clamp_max(output.shape[1] - 1)

    def expected(self, output: Tensor) -> Tensor:
        """The probabilities of the classes, soft labels."""
        return output.detach().softmax(1)

    def root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """√p_c (p − e_c) for class c: Σ_c gives diag(p) − p pᵀ, one position at a time."""
        logits = output.detach()
        probabilities = logits.softmax(1)
        positions = self.positions(output)
        eye = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        for c in range(logits.shape[1]):
            unit = eye[c].view(1, -1, *([1] * (logits.dim() - 2)))
            column = probabilities[:, c : c + 1].sqrt() * (probabilities - unit)
            yield from one_position_at_a_time(column, positions)

    def drawn_root(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """At every position one column, drawn by its squared length and divided by the root of its probability.

        At each position v has the length √tr Λ, whatever is drawn. Where a network is sure of its answer, almost every
        sampled label gives a vanishing gradient and a rare one a huge one; this draw has no such noise. Where there
        are several positions signs are random, so that cross terms between positions have mean zero.
        """
        p = output.detach().softmax(1).movedim(1, -1)  # (N, …, C)
        squares = p.double() * (p.square().sum(-1, keepdim=True) - 2 * p + 1)
        total = squares.sum(-1, keepdim=True)
        uniform = torch.rand(total.shape, generator=generator, device=generator.device, dtype=torch.float64)
        drawn = (squares.cumsum(-1) < uniform.to(total.device) * total).sum(-1, keepdim=True)
        drawn = drawn.clamp_max(p.shape[-1] - 1)
        chance = squares.gather(-1, drawn)
        weight = torch.where(chance > 0, p.gather(-1, drawn) * total / chance.clamp_min(1e-300), 0.0).sqrt()
        if self.positions(output) > 1:
            weight = weight * signs(weight.shape, generator, weight)
        v = weight.to(p.dtype) * p
        return v.scatter_add(-1, drawn, -weight.to(p.dtype)).movedim(-1, 1)

    def curvature(self, output: Tensor, tangent: Tensor) -> Tensor:
        """(diag(p) − p pᵀ) tangent at every position."""
        p = output.detach().softmax(1)
        return p * (tangent - (p * tangent).sum(1, keepdim=True))

    def positions(self, output: Tensor) -> int:
        return output[0, 0].numel()

    def accuracy(self, output: Tensor, target: Tensor) -> Tensor:
        """Top-1 over positions that are not ignored; the label of a soft target is its most likely class."""
        labels, kept = (target.argmax(1), None) if target.is_floating_point() else (target, self._kept(target))
        right = output.argmax(1) == labels
        values = (right if kept is None else right & kept).double().unsqueeze(-1).flatten(1).mean(1)
        return values if kept is None else values * (labels.numel() / max(self.counted(target), 1.0))

    # -- weights -------------------------------------------------------------------------------------------
    def weights(self, output: Tensor, target: Tensor) -> Tensor | None:
        """Σ_c w_c v_c at each position, v the smoothed target: −Σ w_c v_c log p_c has that times diag p − p pᵀ."""
        labels, smooth = self._labels(target, output), self.label_smoothing
        if labels.is_floating_point():
            v = (1 - smooth) * labels + smooth / output.shape[1]
            w = output.new_tensor(self.weight or [1.0] * output.shape[1])
            return (v * w.view(-1, *[1] * (v.dim() - 2))).sum(1, keepdim=True)
        kept = self._kept(labels)
        if self.weight is None:
            if kept is None:
                return None
            found = kept.to(output.dtype)
        else:
            w = output.new_tensor(self.weight)
            found = ((1 - smooth) * w + smooth * w.mean())[labels if kept is None else labels.where(kept, 0)]
            found = found if kept is None else found * kept
        return (found * self._ratio(labels)).unsqueeze(1)

    @property
    def plain(self) -> Likelihood:
        return Categorical(self.reduction)

    def divisor(self, target: Tensor) -> float:
        """As in torch: the positions that are not ignored, each weighted by its class where targets are indices."""
        if self.reduction == "sum":
            return float(len(target))
        if self.weight is None or target.is_floating_point():
            return self.counted(target)
        labels, kept = self._labels(target), self._kept(target)
        w = torch.tensor(self.weight, dtype=torch.float64, device=labels.device)
        return float(w[labels].sum() if kept is None else (w[labels.where(kept, 0)] * kept).sum())

    def counted(self, target: Tensor) -> float:
        """Positions that are not ignored."""
        if target.is_floating_point():
            return target.numel() / target.shape[1] if target.dim() > 1 else float(len(target))
        kept = self._kept(target)
        return float(target.numel() if kept is None else kept.sum())

    def _ratio(self, labels: Tensor) -> float:
        """The number of positions over the divisor of the mean; exactly 1 where they are equal."""
        if self.reduction == "sum":
            return 1.0
        divisor = self.divisor(labels)
        positions = labels.numel() / (labels.shape[1] if labels.is_floating_point() else 1)
        return positions / divisor if divisor else 0.0

    def _kept(self, labels: Tensor) -> Tensor | None:
        """Which positions are not ignored; None where all are kept."""
        if self._extent(labels).all_kept:
            return None
        return labels.long() != self.ignore_index

    def _extent(self, labels: Tensor) -> _Extent:
        """What is to be known of labels before they are used, read from the device once for all uses of a tensor."""
        asked = None if labels.is_inference() else (labels._version, self.ignore_index)
        known = _EXTENTS.get(labels)
        if known is not None and known[0] == asked:
            return known[1]
        every, ends = labels.long(), torch.iinfo(torch.long)
        if not every.numel():
            return _Extent(ends.max, ends.min, True)
        kept = every != self.ignore_index  # as bytes, -100 would be 156
        extremes = every.where(kept, ends.max).amin(), every.where(kept, ends.min).amax(), kept.all().long()
        least, most, all_kept = torch.stack(extremes).tolist()
        found = _Extent(least, most, bool(all_kept))
        if asked is not None:  # of an inference tensor it cannot be told whether it has changed
            _EXTENTS[labels] = asked, found
        return found

    def _labels(self, target: Tensor, output: Tensor | None = None) -> Tensor:
        """The targets, after checking that they are class indices (as int64) or distributions over the classes."""
        classes = len(self.weight or ()) if output is None else self._classes(output)
        if output is not None:
            _refuse_shapes(output, target)
        if target.is_floating_point():
            if bool((target < 0).any()):
                raise DataError(f"soft labels down to {float(target.min()):g} were given; probabilities are needed")
            return target if output is None else target.to(output.dtype)
        least, most, _ = self._extent(target)
        if least < 0 or most >= classes:
            wrong = least if least < 0 else most
            raise DataError(
                f"the data has labels from {least} to {most}, the model's outputs are {classes} classes (0 to "
                f"{classes - 1}): mend the labels, or the model; where {wrong} marks what is to be ignored give "
                f"loss=Categorical(ignore_index={wrong})"
            )
        return target.long()

    def _classes(self, output: Tensor) -> int:
        if output.dim() < 2:
            raise DataError(
                f"the model gives {tuple(output.shape)}; logits (examples, classes, …) were needed: for one logit give "
                "loss='bernoulli'"
            )
        if self.weight is not None and len(self.weight) != output.shape[1]:
            raise SettingsError(
                f"the loss has {len(self.weight)} class weights, the model gives {output.shape[1]} classes "
                f"(outputs {tuple(output.shape)}): give a weight for each class"
            )
        return output.shape[1]


@dataclass(frozen=True)
class LogProbabilities(Categorical):
    """Cross-entropy for networks that end in log_softmax, as `torch.nn.NLLLoss` expects.

    The softmax of log-probabilities is the probabilities, so loss and Gauss-Newton matrix are those of cross-entropy.
    """

    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        excess = output.detach().float().logsumexp(1).abs().max() if output.dim() > 1 else output.new_zeros(())
        if not bool(excess < max(1e-3, torch.finfo(output.dtype).eps ** 0.5)):
            raise DataError(
                "NLLLoss takes log-probabilities, and those that the model gives do not add up to one: let the model "
                "end in log_softmax, or give CrossEntropyLoss"
            )
        return super().elementwise(output, target)


def _refuse_shapes(output: Tensor, target: Tensor) -> None:
    """Raise a DataError unless the target is (N, …) integers or (N, C, …) floats for outputs (N, C, …)."""
    indices = (len(output), *output.shape[2:])
    if target.is_complex() or tuple(target.shape) == indices and target.is_floating_point():
        raise DataError(
            f"the labels are {target.dtype}, of shape {tuple(target.shape)}; class indices are integers: give "
            "targets.long(), or probabilities of the outputs' shape"
        )
    if tuple(target.shape) == (tuple(output.shape) if target.is_floating_point() else indices):
        return
    if target.shape == output.shape[:-1]:
        advice = "classes come second, (N, C, …): let the model return logits.movedim(-1, 1)"
    elif tuple(target.shape) == (len(output), 1, *output.shape[2:]):
        advice = f"labels of shape {indices} are needed: give targets.squeeze(1)"
    elif target.shape == output.shape:
        advice = "class indices have no dimension of classes: give targets.argmax(1), or targets.float() as soft labels"
    else:
        advice = f"labels of shape {indices}, or probabilities of the outputs' shape, are needed: mend the data"
    raise DataError(
        f"the model gives {tuple(output.shape)} and the labels are {tuple(target.shape)}, {target.dtype}; {advice}"
    )
