"""A layer's weights and bias as one matrix for each group, read from the model and written back with its mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.reconstruction.regressions import Regression
from sparsekit.reconstruction.uses import Piece


class LayerWeights:
    """Reads and writes the weights of regressions.

    Args:
        model: written in place.
        space: the prunable weights.
        mask: over them; removed weights are written as zeros.
    """

    def __init__(self, model: nn.Module, space: ParameterSpace, mask: Mask) -> None:
        self._model, self._space, self._mask = model, space, mask

    def tensor(self, piece: Piece) -> Tensor:
        """The rows of a parameter, detached: writing to it changes the model."""
        return self._model.get_parameter(piece.name).detach()[piece.start : piece.stop]

    def bias(self, piece: Piece | None) -> Tensor | None:
        """The same for a bias; None without one."""
        return None if piece is None else self.tensor(piece)

    def read(self, layer: Regression) -> Tensor:
        """(g, out, in) in float64, with the bias as a last column."""
        W = self.tensor(layer.piece).reshape(layer.groups, -1, layer.width - (layer.bias is not None)).double()
        if layer.bias is None:
            return W
        bias = self.tensor(layer.bias).double().view(layer.groups, -1, 1)
        return torch.cat([W, bias if layer.norms is None else torch.zeros_like(bias)], dim=2)

    def kept(self, layer: Regression, W: Tensor) -> Tensor:
        """The mask in the shape of W, (g, out, in); True for weights that are not prunable."""
        parts = [piece for piece in (layer.piece, layer.bias) if piece is not None]
        columns = []
        for piece in parts:
            if piece.name in self._space:
                info = self._space[piece.name]
                kept = self._mask.kept[info.slice].view(info.shape)[piece.start : piece.stop]
            else:
                kept = torch.ones_like(self.tensor(piece), dtype=torch.bool)
            columns.append(kept.reshape(layer.groups, W.shape[1], -1).to(W.device))
        return torch.cat(columns, dim=2)

    def write(self, layer: Regression, W: Tensor, scale: float | None) -> None:
        """Write W (g, out, in) to the model, removed weights as zeros; `scale` is that of the bias's input."""
        weight = self.tensor(layer.piece)
        inputs = layer.width - (layer.bias is not None)
        kept = self.kept(layer, W)
        clean = torch.where(kept, W, 0.0)
        weight.copy_(clean[:, :, :inputs].reshape(weight.shape))
        if layer.bias is not None and scale is not None:
            bias, fitted = self.tensor(layer.bias), (clean[:, :, -1] * scale).flatten()
            bias.copy_(fitted if layer.norms is None else bias + layer.norms[0].scale * fitted)
