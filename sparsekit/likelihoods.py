"""Loss functions as likelihoods: the loss, its labels' distribution, and its curvature in the outputs.

A Fisher matrix needs more than a loss: labels drawn from the model's own distribution, or the square root
of the loss's Hessian in the outputs. A likelihood supplies these beside the loss.

Every likelihood here is a sum or a mean over the T positions (or output units) of an example; L is the mean
over examples of that. Dividing by T scales the loss by 1/T but the covariance of its gradient by 1/T²; Fisher
rows are therefore taken from a *score* scaled by 1/√T, so that their second moment is the Gauss-Newton matrix
of the very loss that is reported.

Positions may count differently: not at all where a target is to be ignored, by their class's weight where classes
have one. Then −log p of position t of example n enters the loss with a weight c_nt, the mean is over the weights of
all examples as in `torch.nn.CrossEntropyLoss`, and Λ_nt enters the Gauss-Newton matrix with c_nt too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.errors import DataError, SettingsError

#: What a batch weighs at least whose targets are all of classes of weight zero: smoothed labels give it a loss.
NOTHING = 1e-12

Reduction = Literal["mean", "sum"]
Loss = Callable[[Tensor, Tensor], Tensor]


class Likelihood(ABC):
    """p(y | output) of one example, and the loss −log p up to a constant and the reduction over positions."""

    name: str
    reduction: Reduction

    @abstractmethod
    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        """−log p at every position: (N, …)."""

    @abstractmethod
    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Labels drawn from p(y | output), in the form of `target`."""

    @abstractmethod
    def root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """Columns r_c of Λ^{1/2}, shaped like `output`: Σ_c r_c r_cᵀ = Λ = ∂²(Σ_t −log p)/∂output².

        For positions that are independent given the output, cross terms between positions have mean zero
        only; so a column covers one position at a time where there are several.
        """

    def drawn_root(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """A random v of each example, shaped like `output`, with E[v vᵀ] = Λ: one backward pass for all columns.

        The columns of Λ^{1/2} with random signs; a likelihood whose curvature is known by position does better.
        """
        total = torch.zeros_like(output)
        for column in self.root_columns(output):
            signs = _signs((len(output),), generator, output)
            total = total + column * signs.view(-1, *([1] * (output.dim() - 1)))
        return total

    def curvature(self, output: Tensor, tangent: Tensor) -> Tensor:
        """Λ_n tangent_n for each example, shaped like `output`."""
        image = torch.zeros_like(tangent)
        for column in self.root_columns(output):
            inner = (column * tangent).flatten(1).sum(1)
            image = image + column * inner.view(-1, *([1] * (tangent.dim() - 1)))
        return image

    def position_weights(self, output: Tensor, target: Tensor) -> Tensor | None:
        """What −log p of each position is multiplied with in its example's loss; None: 1/T under a mean, else 1.

        Shaped to multiply `output`: (N, 1, …) for classes along the second dimension. Scaled so that the mean of
        `losses` over the batch is the batch's loss.
        """
        return None

    def share(self, target: Tensor) -> float | None:
        """How much a batch counts in the mean over several, in examples where all count alike; None: that it is."""
        return None

    def counted(self, target: Tensor) -> Tensor | None:
        """Which positions accuracy is taken over, in the form of `target`, bool; None: all."""
        return None

    def of_own_labels(self) -> Likelihood:
        """The plain −log p, as it is taken of labels drawn from p."""
        return self

    def check(self, output: Tensor, target: Tensor) -> None:
        """Refuse outputs and targets that do not go together; DataError or SettingsError."""
        self.elementwise(output, target)

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of each example, (N,): −log p summed or averaged over positions."""
        if output.dtype in (torch.bfloat16, torch.float16):  # too few digits for a mean
            output = output.float()
        values = self.elementwise(output, target).flatten(1)
        weights = self.position_weights(output, target)
        if weights is not None:
            return (values * weights.flatten(1)).sum(1)
        return values.mean(1) if self.reduction == "mean" else values.sum(1)

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """(N,): −log p scaled so that, for sampled labels, E[∇score ∇scoreᵀ] is the Gauss-Newton matrix of L."""
        values = self.elementwise(output, target).flatten(1)
        return values.sum(1) * self.score_scale(values.shape[1])

    def score_scale(self, positions: int) -> float:
        """1/√T under the mean over T positions, else 1."""
        return positions**-0.5 if self.reduction == "mean" else 1.0

    @abstractmethod
    def positions(self, output: Tensor) -> int:
        """T, the number of independent positions (or units) of one example's output."""

    def accuracy(self, output: Tensor, target: Tensor) -> Tensor | None:
        """(N,) the fraction of positions predicted right, or None where the notion has no meaning."""
        return None


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Softmax outputs: logits (N, C) or (N, C, …); cross-entropy, as `torch.nn.CrossEntropyLoss` has it.

    Targets are class indices (N,) or (N, …), or probabilities of the shape of the outputs.

    Attributes:
        ignore_index: a target that does not count, neither in the loss nor in its curvature nor in accuracy.
        class_weights: w_c of each class; the mean is then over the weights of the targets. The loss's Hessian in a
            position's logits is w_y (diag p − p pᵀ).
        label_smoothing: ε; the target distribution is (1 − ε) e_y + ε/C.
        log_probabilities: whether outputs are log p already, as `torch.nn.NLLLoss` wants them.
    """

    reduction: Reduction = "mean"
    ignore_index: int = -100
    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    log_probabilities: bool = False
    name = "categorical"

    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy with the target distribution at every position, (N, …, 1); 0 where it does not count."""
        weights, target = self._class_weights(output), self._target(output, target)
        values = F.cross_entropy(
            output,
            target,
            weight=weights,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        if weights is not None or target.is_floating_point():
            c, _ = self._counts(output, target)
            values = torch.where(c > 0, values / c.clamp_min(torch.finfo(c.dtype).tiny), 0.0)
        return values.unsqueeze(-1)

    def position_weights(self, output: Tensor, target: Tensor) -> Tensor | None:
        target = self._target(output, target)
        if self._all_alike(target):
            return None
        c, shares = self._counts(output, target)
        if self.reduction == "mean":
            c = c * (len(c) / shares.sum().clamp_min(NOTHING))
        return c.unsqueeze(1)

    def share(self, target: Tensor) -> float | None:
        if self.reduction == "sum" or target.is_floating_point():  # torch's mean is over all positions of these
            return None
        kept, positions = target != self.ignore_index, max(1, target[:1].numel())
        if self.class_weights is None:
            return float(kept.sum()) / positions
        weights = torch.tensor(self.class_weights, dtype=torch.float64, device=target.device)
        total = torch.where(kept, weights[torch.where(kept, target, 0).long()], 0.0).sum()
        return float(total.clamp_min(NOTHING)) / positions

    def counted(self, target: Tensor) -> Tensor | None:
        if target.is_floating_point():
            return None
        kept = target != self.ignore_index
        return None if bool(kept.all()) else kept

    def of_own_labels(self) -> Categorical:
        return Categorical(self.reduction)

    def check(self, output: Tensor, target: Tensor) -> None:
        target, classes = self._target(output, target), output.shape[1]
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise SettingsError(f"the loss has {len(self.class_weights)} class weights, the model {classes} classes")
        if self.log_probabilities and not bool((output.double().logsumexp(1).abs() < 1e-2).all()):
            raise SettingsError(
                "NLLLoss takes log-probabilities, and the model's outputs are none: end the model with LogSoftmax, or "
                "give CrossEntropyLoss"
            )
        if target.is_floating_point():
            return
        kept = target[target != self.ignore_index]
        if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < classes:
            raise DataError(
                f"the data has labels from {int(kept.min())} to {int(kept.max())}, the model {classes} classes (the "
                f"second dimension of its outputs {tuple(output.shape)}): 0 to {classes - 1} were needed; map the "
                "labels, or name the one to ignore: loss=CrossEntropyLoss(ignore_index=…)"
            )

    def _target(self, output: Tensor, target: Tensor) -> Tensor:
        """Class indices as int64, or probabilities."""
        if output.dim() < 2:
            raise DataError(f"outputs (examples, classes, …) were needed; the model gives {tuple(output.shape)}")
        if target.is_floating_point() and target.shape == output.shape:
            return target.to(output.dtype)
        if target.shape != (len(output), *output.shape[2:]):
            advice = "reshape the targets"
            if target.shape == output.shape[:-1]:
                advice = "classes go along the second dimension: return output.movedim(-1, 1)"
            elif target.shape == (len(output), 1):
                advice = "give targets.squeeze(1)"
            raise DataError(
                f"the categorical loss takes outputs (N, classes, …) and targets (N, …); the model gives "
                f"{tuple(output.shape)}, the data {tuple(target.shape)}: {advice}"
            )
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise DataError(f"class indices are whole numbers; the data gives {target.dtype}: use targets.long()")
        return target.long()

    def _class_weights(self, output: Tensor) -> Tensor | None:
        given = self.class_weights
        return None if given is None else torch.tensor(given, dtype=output.dtype, device=output.device)

    def _all_alike(self, target: Tensor) -> bool:
        return self.class_weights is None and not target.is_floating_point() and self.counted(target) is None

    def _counts(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Of each position, (N, …): c, which −log p and Λ are multiplied with, and z, its share in the mean."""
        weights, smooth = self._class_weights(output), self.label_smoothing
        if target.is_floating_point():
            per_class = (1 - smooth) * target + smooth / output.shape[1]
            c = per_class.movedim(1, -1)
            return (c if weights is None else c * weights).sum(-1), torch.ones_like(c[..., 0])
        kept = target != self.ignore_index
        if weights is None:
            return kept.to(output.dtype), kept.to(output.dtype)
        z = torch.where(kept, weights[torch.where(kept, target, 0)], 0.0)
        return (1 - smooth) * z + smooth * weights.mean() * kept, z

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        probabilities = output.detach().movedim(1, -1).double().softmax(-1)  # (N, …, C)
        shape = (*probabilities.shape[:-1], 1)
        uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
        below = probabilities.cumsum(-1) < uniform.to(output.device)
        return below.sum(-1).clamp_max(output.shape[1] - 1)

    def root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """√p_c (p − e_c) for class c: Σ_c gives diag(p) − p pᵀ, one position at a time."""
        logits = output.detach()
        probabilities = logits.softmax(1)
        positions = self.positions(output)
        eye = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        for c in range(logits.shape[1]):
            unit = eye[c].view(1, -1, *([1] * (logits.dim() - 2)))
            column = probabilities[:, c : c + 1].sqrt() * (probabilities - unit)
            yield from _one_position_at_a_time(column, positions)

    def drawn_root(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """At every position one column, drawn by its squared length and divided by the root of its probability.

        v has the length √tr Λ there, whatever is drawn. Where a network is sure of its answer, almost every
        sampled label gives a vanishing gradient and a rare one a huge one; this draw has no such noise. Signs are
        random where there are several positions, so that the parts between them have mean zero.
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
            weight = weight * _signs(weight.shape, generator, weight)
        v = weight.to(p.dtype) * p
        return v.scatter_add(-1, drawn, -weight.to(p.dtype)).movedim(-1, 1)

    def curvature(self, output: Tensor, tangent: Tensor) -> Tensor:
        """(diag(p) − p pᵀ) tangent at every position."""
        p = output.detach().softmax(1)
        return p * (tangent - (p * tangent).sum(1, keepdim=True))

    def positions(self, output: Tensor) -> int:
        return output[0, 0].numel()

    def accuracy(self, output: Tensor, target: Tensor) -> Tensor:
        """(N,) top-1 over the positions that count, scaled so that the mean is the batch's accuracy."""
        if target.is_floating_point():
            target = target.argmax(1)
        right = (output.argmax(1) == target).double().unsqueeze(-1).flatten(1)
        kept = self.counted(target)
        if kept is None:
            return right.mean(1)
        kept = kept.double().unsqueeze(-1).flatten(1)
        return (right * kept).sum(1) * (len(kept) / kept.sum().clamp_min(1))


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent units with logits (N, …), targets of the same shape in [0, 1]; binary cross-entropy."""

    reduction: Reduction = "mean"
    name = "bernoulli"

    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        _same_shape(self.name, output, target)
        values = F.binary_cross_entropy_with_logits(output, target.to(output.dtype), reduction="none")
        return values.reshape(len(output), -1)

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(output.shape, generator=generator, device=generator.device)
        return (uniform.to(output.device) < output.detach().sigmoid()).to(output.dtype)

    def root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """√(p(1−p)) e_t for unit t."""
        yield from _one_unit_at_a_time(self._variance(output).sqrt())

    def drawn_root(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """√(p(1−p)) at every unit, with random signs."""
        return self._variance(output).sqrt() * _signs(output.shape, generator, output)

    def curvature(self, output: Tensor, tangent: Tensor) -> Tensor:
        """p(1−p) tangent at every unit."""
        return self._variance(output) * tangent

    @staticmethod
    def _variance(output: Tensor) -> Tensor:
        p = output.detach().sigmoid()
        return p * (1 - p)

    def positions(self, output: Tensor) -> int:
        return output[0].numel()

    def accuracy(self, output: Tensor, target: Tensor) -> Tensor:
        """(N,) fraction of units on the right side of one half."""
        return ((output > 0) == (target > 0.5)).double().reshape(len(output), -1).mean(1)


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Outputs (N, …) with noise of fixed `variance`: loss Σ or mean of (y − f)² / (2 variance).

    `torch.nn.MSELoss()` is Gaussian(variance=0.5, reduction="mean").
    """

    variance: float = 1.0
    reduction: Reduction = "mean"
    name = "gaussian"

    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        _same_shape(self.name, output, target)
        return ((output - target).square() / (2 * self.variance)).reshape(len(output), -1)

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(output.shape, generator=generator, device=generator.device, dtype=output.dtype)
        return output.detach() + self.variance**0.5 * noise.to(output.device)

    def root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """e_t / √variance for unit t."""
        yield from _one_unit_at_a_time(torch.full_like(output.detach(), self.variance**-0.5))

    def drawn_root(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """1/√variance at every unit, with random signs."""
        return self.variance**-0.5 * _signs(output.shape, generator, output)

    def curvature(self, output: Tensor, tangent: Tensor) -> Tensor:
        """Tangent / variance."""
        return tangent / self.variance

    def positions(self, output: Tensor) -> int:
        return output[0].numel()


@dataclass(frozen=True)
class Unspecified(Likelihood):
    """Any loss(output, target) -> scalar mean: it has gradients, but no distribution to sample labels from.

    Only the empirical Fisher can be taken of it.
    """

    function: Loss
    reduction: Reduction = "sum"
    name = "unspecified"

    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        """One example at a time, so that a mean over the batch is undone."""
        values = [self.function(output[i : i + 1], target[i : i + 1]) for i in range(len(output))]
        if any(not isinstance(value, Tensor) or value.numel() != 1 for value in values):
            raise SettingsError(
                f"the loss {self.function!r} gave something else than one number for an example; a mean over the batch "
                "was needed: use reduction='mean'"
            )
        return torch.stack(values).reshape(len(output), 1)

    def check(self, output: Tensor, target: Tensor) -> None:
        """Its value for a batch must be the mean of its values for the examples, or L would be another function."""
        whole, alone = self.function(output, target).double().mean(), self.elementwise(output, target).double()
        if bool(alone.isnan().any() & ~whole.isnan()) or not torch.allclose(whole, alone.mean(), rtol=1e-2, atol=1e-6):
            raise SettingsError(
                f"the loss {self.function!r} of a batch, {float(whole):.4g}, is not the mean of its examples', "
                f"{float(alone.mean()):.4g}, as it is with reduction='sum', weights or ignored targets: use "
                "reduction='mean', and for class weights or ignored targets torch.nn.CrossEntropyLoss or a Likelihood"
            )

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        raise self._no_distribution()

    def root_columns(self, output: Tensor) -> Iterator[Tensor]:
        raise self._no_distribution()

    def positions(self, output: Tensor) -> int:
        return 1

    def _no_distribution(self) -> SettingsError:
        return SettingsError(
            f"the loss {self.function!r} is not a likelihood that sparsekit knows, so its labels cannot be "
            "sampled; set the estimator's fisher='empirical', or give loss as 'categorical', 'bernoulli', "
            "'gaussian' or a Likelihood"
        )


def _signs(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Random ±1 of a shape, of the type and on the device of `like`."""
    drawn = torch.randint(2, shape, generator=generator, device=generator.device)
    return (2 * drawn - 1).to(like.device, like.dtype)


def _same_shape(name: str, output: Tensor, target: Tensor) -> None:
    if output.shape != target.shape:
        raise DataError(
            f"the {name} loss compares outputs and targets of one shape; the model gives {tuple(output.shape)}, the "
            f"data {tuple(target.shape)}: reshape one of them"
        )


def _one_position_at_a_time(column: Tensor, positions: int) -> Iterator[Tensor]:
    if positions == 1:
        yield column
        return
    flat = column.flatten(2)  # (N, C, T)
    for t in range(positions):
        single = torch.zeros_like(flat)
        single[:, :, t] = flat[:, :, t]
        yield single.view_as(column)


def _one_unit_at_a_time(values: Tensor) -> Iterator[Tensor]:
    flat = values.reshape(len(values), -1)
    for t in range(flat.shape[1]):
        single = torch.zeros_like(flat)
        single[:, t] = flat[:, t]
        yield single.view_as(values)


_NAMED: dict[str, Callable[[], Likelihood]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
}


def as_likelihood(loss: str | Loss | Likelihood) -> Likelihood:
    """A likelihood from its name, from torch's loss modules and functions, or from any loss.

    Torch's cross-entropy and negative log-likelihood are recognised with class weights, label smoothing and an
    ignored index, as modules, functions or `functools.partial` of these; binary cross-entropy with logits and mean
    squared error where they are used plainly. Any other callable becomes `Unspecified`.

    Raises:
        SettingsError: no such name, or cross-entropy with a reduction that is no mean.
    """
    if isinstance(loss, Likelihood):
        return loss
    if isinstance(loss, str):
        if loss not in _NAMED:
            raise SettingsError(f"no loss '{loss}'; known by name: {', '.join(sorted(_NAMED))}")
        return _NAMED[loss]()
    if type(loss) in (nn.CrossEntropyLoss, nn.NLLLoss):
        return _categorical(type(loss) is nn.NLLLoss, vars(loss) | {"weight": loss.weight})  # type: ignore[attr-defined]
    function, given = (loss.func, loss.keywords) if isinstance(loss, partial) and not loss.args else (loss, {})
    if function in (F.cross_entropy, F.nll_loss):
        return _categorical(function is F.nll_loss, given)
    if loss is F.binary_cross_entropy_with_logits or _is_plain(loss, nn.BCEWithLogitsLoss, ("weight", "pos_weight")):
        return Bernoulli()
    return Gaussian(variance=0.5) if loss is F.mse_loss or _is_plain(loss, nn.MSELoss, ()) else Unspecified(loss)


def _categorical(log_probabilities: bool, given: Mapping[str, Any]) -> Categorical:
    reduction, weight = given.get("reduction", "mean"), given.get("weight")
    if reduction != "mean":
        raise SettingsError(
            f"the loss has reduction='{reduction}'; the mean over the examples is pruned by: use reduction='mean'"
        )
    if weight is not None and not (bool((weight >= 0).all()) and bool((weight > 0).any())):
        raise SettingsError(f"class weights of zero and more were needed, {weight.tolist()} were given")
    return Categorical(
        ignore_index=given.get("ignore_index", -100),
        class_weights=None if weight is None else tuple(weight.detach().double().tolist()),
        label_smoothing=given.get("label_smoothing", 0.0),
        log_probabilities=log_probabilities,
    )


def _is_plain(loss: object, kind: type, absent: tuple[str, ...]) -> bool:
    return (
        type(loss) is kind
        and getattr(loss, "reduction", None) == "mean"
        and all(getattr(loss, name) is None for name in absent)
    )
