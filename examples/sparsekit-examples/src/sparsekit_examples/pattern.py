"""The pattern `balanced`."""

import torch
from torch import Tensor

from sparsekit import Mask, ParameterInfo, ParameterSpace, Pattern, Settings


class Balanced(Pattern[Settings]):
    """The same number of weights from every output row of a tensor, those with the lowest scores of the row."""

    name = "balanced"
    across_layers = False  # scores are compared within a row alone

    @staticmethod
    def _of_each_row(info: ParameterInfo, sparsity: float) -> int:
        return round(sparsity * (info.size // info.shape[0]))

    def count(self, space: ParameterSpace, sparsity: float) -> int:
        return sum(info.shape[0] * self._of_each_row(info, sparsity) for info in space.parameters)

    def choose(self, scores: Tensor, mask: Mask, count: int, space: ParameterSpace) -> Tensor:
        chosen = torch.zeros_like(mask.kept)
        left = count - mask.removed_count
        for info in space.parameters:
            rows = scores[info.slice].masked_fill(~mask.kept[info.slice], float("inf")).view(info.shape[0], -1)
            gone = int((~mask.kept[info.slice]).sum()) // info.shape[0]
            more = max(self._of_each_row(info, count / space.size) - gone, 0)
            lowest = rows.argsort(dim=1, stable=True)[:, :more]
            part = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, lowest, True)
            chosen[info.slice] = part.flatten()
            left -= int(part.sum())
        assert left == 0
        return chosen
