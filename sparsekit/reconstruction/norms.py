"""Batch normalisations after fitted layers: their statistics are taken anew, and their affine map is the dense one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsekit.reconstruction.moments import Moments
from sparsekit.reconstruction.regressions import Regression


def output_statistics(W: Tensor, moments: Moments, scale: float) -> tuple[Tensor, Tensor]:
    """Mean and variance, (g·out,) each, of a layer's outputs W x̂ without a bias.

    Args:
        W: (g, out, in + 1); the last input is the constant `scale`.
        moments: of the inputs, with that constant as the last.
        scale: see above.
    """
    A, _, _ = moments.means(scale)
    W = W[:, :, :-1]
    mean = (W @ A[:, :-1, -1:]).squeeze(2) / scale
    variance = ((W @ A[:, :-1, :-1]) * W).sum(2) - mean.square()
    return mean.flatten(), variance.clamp_min(0).flatten()


class RenewedNorms:
    """Sets the normalisations of a pruned network so that their outputs have the dense ones' mean and variance.

    A fit explains a part of the outputs' variance; under the dense network's statistics the rest is lost, and layer by
    layer what arrives shrinks. With the statistics of the new outputs, evaluation and training mode are one function,
    and weights need not grow to make up for it.

    Args:
        pruned, dense: networks of one architecture; the first is changed in place.
    """

    def __init__(self, pruned: nn.Module, dense: nn.Module) -> None:
        self._pruned, self._dense = pruned, dense
        self._statistics: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def renew(self, layer: Regression, dense: Tensor, W: Tensor, moments: Moments, scale: float | None) -> Tensor:
        """Take over the statistics of a layer's new outputs, if a normalisation follows it.

        A normalisation makes the length of a filter meaningless, so each gets the length of its kept weights in the
        dense network, at which learning rates and weight decay mean what they did.

        Args:
            layer: the regression.
            dense: its kept weights in the dense network, (g, out, in + 1).
            W: the fitted ones; the last input is the constant `scale`.
            moments: of the fitted examples.
            scale: of the constant input; None without one, and then nothing is renewed.

        Returns:
            The weights to be written, W or its rows at other lengths.
        """
        if layer.after is None or scale is None:
            return W
        now, dense_norm = layer.after
        name = now.name.rpartition(".")[0]
        norm, theirs = self._pruned.get_submodule(name), self._dense.get_submodule(name)
        if not (isinstance(norm, _BatchNorm) and isinstance(theirs, _BatchNorm)):
            return W
        lengths = [V[:, :, :-1].norm(dim=2, keepdim=True) for V in (dense, W)]
        W = W * torch.where((lengths[0] > 0) & (lengths[1] > 0), lengths[0] / lengths[1], 1.0)
        mean, variance = output_statistics(W, moments, scale)
        if layer.norms is None:  # the layer has a bias of its own
            mean = mean + W[:, :, -1].flatten() * scale
        norm.weight.copy_(theirs.weight)
        norm.bias.copy_(theirs.bias)
        self._statistics[name] = mean, variance
        self._write(norm, mean, variance)
        spread = (variance.to(now.scale) + norm.eps).sqrt()
        layer.after = now._replace(mean=mean.to(now.mean), scale=norm.weight / spread, bias=theirs.bias), dense_norm
        if layer.norms is not None:
            layer.norms = layer.after
            W = torch.cat([W[:, :, :-1], torch.zeros_like(W[:, :, -1:])], dim=2)  # the affine map is the dense one
        return W

    def restore(self) -> None:
        """Write all renewed statistics again: passes leave buffers as they found them."""
        for name, (mean, variance) in self._statistics.items():
            norm = self._pruned.get_submodule(name)
            assert isinstance(norm, _BatchNorm)
            self._write(norm, mean, variance)

    @staticmethod
    @torch.no_grad()
    def _write(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
