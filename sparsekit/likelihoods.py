"""Loss functions as likelihoods: the loss, its labels' distribution, and its curvature in the outputs.

A Fisher matrix needs more than a loss: labels drawn from the model's own distribution, or the square root
of the loss's Hessian in the outputs. A likelihood supplies these beside the loss.

Every likelihood here is a sum or a mean over the T positions (or output units) of an example; L is the mean
over examples of that. Dividing by T scales the loss by 1/T but the covariance of its gradient by 1/T²; Fisher
rows are therefore taken from a *score* scaled by 1/√T, so that their second moment is the Gauss-Newton matrix
of the very loss that is reported.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.errors import DataError, SettingsError

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

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of each example, (N,): −log p summed or averaged over positions."""
        values = self.elementwise(output, target).flatten(1)
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
    """Softmax outputs: logits (N, C) or (N, C, …), targets (N,) or (N, …) of class indices; cross-entropy."""

    reduction: Reduction = "mean"
    name = "categorical"

    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none").unsqueeze(-1)

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
        """(N,) top-1."""
        return (output.argmax(1) == target).double().unsqueeze(-1).flatten(1).mean(1)


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
        return torch.stack(values).reshape(len(output), 1)

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

    Torch's cross-entropy, binary cross-entropy with logits and mean squared error are recognised when they
    are used plainly (mean, no class weights, no label smoothing, no index ignored); any other callable becomes
    `Unspecified`.
    """
    if isinstance(loss, Likelihood):
        return loss
    if isinstance(loss, str):
        if loss not in _NAMED:
            raise SettingsError(f"no loss '{loss}'; known by name: {', '.join(sorted(_NAMED))}")
        return _NAMED[loss]()
    if loss is F.cross_entropy or _is_plain(
        loss, nn.CrossEntropyLoss, ("weight",), {"label_smoothing": 0.0, "ignore_index": -100}
    ):
        return Categorical()
    if loss is F.binary_cross_entropy_with_logits or _is_plain(
        loss, nn.BCEWithLogitsLoss, ("weight", "pos_weight"), {}
    ):
        return Bernoulli()
    if loss is F.mse_loss or _is_plain(loss, nn.MSELoss, (), {}):
        return Gaussian(variance=0.5)
    return Unspecified(loss)


def _is_plain(loss: object, kind: type, absent: tuple[str, ...], equal: dict[str, object]) -> bool:
    return (
        type(loss) is kind
        and getattr(loss, "reduction", None) == "mean"
        and all(getattr(loss, name) is None for name in absent)
        and all(getattr(loss, name) == value for name, value in equal.items())
    )
