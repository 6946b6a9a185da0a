"""Likelihoods of independent units: Bernoulli (binary cross-entropy) and Gaussian (squared error)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.errors import DataError, SettingsError
from sparsekit.problem.likelihoods.base import Likelihood, Reduction, one_unit_at_a_time, same_shape, signs

#: A tensor's numbers, nested by dimension; unlike a tensor they can be compared and hashed.
Numbers = float | tuple["Numbers", ...]


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent units with logits (N, …), targets of the same shape in [0, 1]; binary cross-entropy.

    Attributes:
        reduction: over the units of an example.
        weight: of each unit, broadcast to the units of one example; a tensor is accepted.
        pos_weight: of the loss of targets of 1, in the same way.

    Raises:
        SettingsError: a weight is negative or not finite, or, at use, does not fit an example's units.
        DataError: at use, a target is not in [0, 1].
    """

    reduction: Reduction = "mean"
    weight: Numbers | None = None
    pos_weight: Numbers | None = None
    name = "bernoulli"

    def __post_init__(self) -> None:
        for name in ("weight", "pos_weight"):
            given = getattr(self, name)
            if given is None:
                continue
            tensor = torch.as_tensor(given, dtype=torch.float64)
            if not bool((tensor >= 0).logical_and(tensor < math.inf).all()):
                raise SettingsError(f"a {name} of {given} was given; finite numbers, none negative, are needed")
            object.__setattr__(self, name, _numbers(tensor.tolist()))

    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        same_shape(self.name, output, target)
        least, most = (float(end) for end in target.aminmax())
        if least < -0.01 or most > 1.01:  # interpolated images overshoot a little
            raise DataError(
                f"the bernoulli loss takes targets from 0 to 1, the data has {least:g} to {most:g}: rescale them, or "
                "give another loss"
            )
        values = F.binary_cross_entropy_with_logits(
            output,
            target.to(output.dtype),
            weight=self._of_units("weight", output),
            pos_weight=self._of_units("pos_weight", output),
            reduction="none",
        )
        return values.reshape(len(output), -1)

    def weights(self, output: Tensor, target: Tensor) -> Tensor | None:
        """At each unit w (1 + (p − 1) y), p the pos_weight: the loss's second derivative is that times σ (1 − σ)."""
        weight, positive = self._of_units("weight", output), self._of_units("pos_weight", output)
        if weight is None and positive is None:
            return None
        found = torch.ones_like(output.detach()) if weight is None else weight.expand_as(output)
        return found if positive is None else found * (1 + (positive - 1) * target.to(output.dtype))

    @property
    def plain(self) -> Likelihood:
        return Bernoulli(self.reduction)

    def _of_units(self, name: str, output: Tensor) -> Tensor | None:
        """A weight as a tensor that broadcasts to `output` from its second dimension on."""
        given = getattr(self, name)
        if given is None:
            return None
        tensor = output.detach().new_tensor(given)
        if tensor.dim() == output.dim() and len(tensor) == 1:  # the same for all examples
            tensor = tensor[0]
        try:
            fits = torch.broadcast_shapes(tensor.shape, output.shape[1:]) == output.shape[1:]
        except RuntimeError:
            fits = False
        if not fits:
            raise SettingsError(
                f"a {name} of shape {tuple(tensor.shape)} was given, an example's outputs are "
                f"{tuple(output.shape[1:])}: give a number for each of its units; examples have no weights of their own"
            )
        return tensor

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(output.shape, generator=generator, device=generator.device)
        return (uniform.to(output.device) < output.detach().sigmoid()).to(output.dtype)

    def expected(self, output: Tensor) -> Tensor:
        """The probabilities of the units."""
        return output.detach().sigmoid()

    def root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """√(p(1−p)) e_t for unit t."""
        yield from one_unit_at_a_time(self._variance(output).sqrt())

    def drawn_root(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """√(p(1−p)) at every unit, with random signs."""
        return self._variance(output).sqrt() * signs(output.shape, generator, output)

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
        same_shape(self.name, output, target)
        return ((output - target).square() / (2 * self.variance)).reshape(len(output), -1)

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(output.shape, generator=generator, device=generator.device, dtype=output.dtype)
        return output.detach() + self.variance**0.5 * noise.to(output.device)

    def expected(self, output: Tensor) -> Tensor:
        """The means: the output itself."""
        return output.detach()

    def root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """e_t / √variance for unit t."""
        yield from one_unit_at_a_time(torch.full_like(output.detach(), self.variance**-0.5))

    def drawn_root(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """1/√variance at every unit, with random signs."""
        return self.variance**-0.5 * signs(output.shape, generator, output)

    def curvature(self, output: Tensor, tangent: Tensor) -> Tensor:
        """Tangent / variance."""
        return tangent / self.variance

    def positions(self, output: Tensor) -> int:
        return output[0].numel()


def _numbers(given: Any) -> Numbers:
    return tuple(_numbers(part) for part in given) if isinstance(given, list) else float(given)
