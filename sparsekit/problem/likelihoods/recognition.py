"""Conversion of losses to likelihoods: torch's are recognised, any other callable has gradients only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.errors import DataError, SettingsError
from sparsekit.problem.likelihoods.base import Likelihood, Reduction
from sparsekit.problem.likelihoods.categorical import Categorical, LogProbabilities
from sparsekit.problem.likelihoods.units import Bernoulli, Gaussian

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Unspecified(Likelihood):
    """Any loss(output, target) -> scalar mean over the examples; it has gradients, but no distribution of labels.

    Only its empirical Fisher is defined. It is called for one example at a time, so that each has a loss of its own;
    every batch is checked to have the mean (or sum) of these as its loss.
    """

    function: Loss
    reduction: Reduction = "sum"
    name = "unspecified"

    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of each example, called one at a time because the loss averages over the batch."""
        values = torch.stack([self._called(output[i : i + 1], target[i : i + 1]) for i in range(len(output))])
        if len(output) > 1:
            self._compare(values.detach(), output.detach(), target)
        return values.reshape(len(output), 1)

    @property
    def _title(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))

    def _called(self, output: Tensor, target: Tensor) -> Tensor:
        try:
            value = self.function(output, target)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise DataError(
                f"the loss {self._title} fails on the outputs {tuple(output.shape)} and the targets "
                f"{tuple(target.shape)}, {target.dtype}, of one example: {error}"
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise DataError(
                f"the loss {self._title} gives {found} for one example; a tensor of one number was needed: let it "
                "take the mean or the sum over the positions"
            )
        return value.reshape(())

    def _compare(self, alone: Tensor, output: Tensor, target: Tensor) -> None:
        """Raise a DataError where the batch's loss is neither the examples' mean nor their sum."""
        with torch.no_grad():
            whole = self.function(output, target)
        tolerance = torch.finfo(alone.dtype).eps ** 0.5 * float(alone.abs().mean())
        mean, given = float(alone.mean()), float(whole.double().mean())
        if whole.numel() == len(alone):  # one number for each example
            agrees = bool(((whole.reshape(-1) - alone).abs() <= tolerance).all())
        else:
            agrees = abs(given - mean) <= tolerance or abs(given / len(alone) - mean) <= tolerance or given == mean
        if agrees or not bool(output.isfinite().all()):  # a loss that is not finite is reported elsewhere
            return
        raise DataError(
            f"the loss {self._title} is {given:.6g} for a batch of {len(alone)}, the mean of its examples one at a "
            f"time {mean:.6g}: it is normalised over the batch (class weights, ignored targets) or joins examples; "
            "give Categorical(weight=…, ignore_index=…), a loss of torch.nn, or one that is a mean over the examples"
        )

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        raise self._no_distribution()

    def root_columns(self, output: Tensor) -> Iterator[Tensor]:
        raise self._no_distribution()

    def positions(self, output: Tensor) -> int:
        return 1

    def _no_distribution(self) -> SettingsError:
        return SettingsError(
            f"the loss {self._title} is not a likelihood that sparsekit knows, so its labels cannot be "
            "sampled; set the estimator's fisher='empirical', or give loss as 'categorical', 'bernoulli', "
            "'gaussian' or a Likelihood"
        )


_NAMED: dict[str, Callable[[], Likelihood]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
}

#: torch's function -> its module, the likelihood, and the options that the likelihood supports.
_TORCH: dict[Any, tuple[type[nn.Module], Callable[..., Likelihood], tuple[str, ...]]] = {
    F.cross_entropy: (nn.CrossEntropyLoss, Categorical, ("weight", "ignore_index", "label_smoothing")),
    F.nll_loss: (nn.NLLLoss, LogProbabilities, ("weight", "ignore_index")),
    F.binary_cross_entropy_with_logits: (nn.BCEWithLogitsLoss, Bernoulli, ("weight", "pos_weight")),
    F.mse_loss: (nn.MSELoss, partial(Gaussian, 0.5), ()),
}


def as_likelihood(loss: str | Loss | Likelihood) -> Likelihood:
    """A likelihood from its name, from torch's loss modules and functions, or from any loss.

    Torch's cross-entropy, negative log-likelihood, binary cross-entropy with logits and mean squared error are
    recognised, with their options, as modules, functions and functions with options set by `functools.partial`.
    reduction='sum' is the sum over an example's positions, followed by the mean over examples. Any other callable
    becomes `Unspecified`.

    Raises:
        SettingsError: there is no loss of that name, or torch's options do not determine the loss.
    """
    if isinstance(loss, Likelihood):
        return loss
    if isinstance(loss, str):
        if loss not in _NAMED:
            raise SettingsError(f"no loss '{loss}'; known by name: {', '.join(sorted(_NAMED))}")
        return _NAMED[loss]()
    if isinstance(loss, type) or not callable(loss):
        raise SettingsError(
            f"the loss is {loss!r}; a name, a Likelihood or what is called with (outputs, targets) was needed"
        )
    for function, (module, likelihood, options) in _TORCH.items():
        if type(loss) is module:
            given = {name: getattr(loss, name) for name in (*options, "reduction")}
        elif loss is function:
            given = {}
        elif isinstance(loss, partial) and loss.func is function and not loss.args:
            given = loss.keywords
        else:
            continue
        return likelihood(**_known(module.__name__, given, options))
    return Unspecified(loss)


def _known(name: str, given: Mapping[str, object], options: tuple[str, ...]) -> dict[str, object]:
    """The options, after checking that the likelihood supports them."""
    reduction = given.get("reduction", "mean")
    if reduction not in ("mean", "sum"):
        raise SettingsError(
            f"{name} with reduction='{reduction}' leaves open how the losses of positions add up: give "
            "reduction='mean' or 'sum'"
        )
    others = [key for key, value in given.items() if key not in (*options, "reduction") and value is not None]
    if others:
        raise SettingsError(f"{name} with {', '.join(others)} is not known: leave it out, or give a loss of your own")
    return {key: value for key, value in given.items() if value is not None}
