"""The Fisher as its blocks: the memory of B vectors, inverted by a Cholesky factor of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from sparsekit.curvature import block_moments
from sparsekit.linalg import BlockDiagonal, LinearOperator
from sparsekit.linalg.lowrank import SINGLE_PRECISION_RANGE
from sparsekit.methods.block_settings import BlockFisherSettings
from sparsekit.problem.objective import Objective
from sparsekit.problem.parameters import ParameterSpace


class KeptBlocks:
    """The statistics Σ g gᵀ on blocks, to which more gradients can be added.

    Attributes:
        mean_diagonal: of F.
    """

    def __init__(self, space: ParameterSpace, settings: BlockFisherSettings, sizes: Sequence[int]) -> None:
        self.space, self.settings, self.sizes = space, settings, list(sizes)
        self.mean_diagonal = 0.0
        self.blocks: Tensor | None = None  # (m, B, B), F on the blocks
        self._judged: Tensor | None = None  # what the precision of the blocks' products was chosen by

    def take(self, rows: Iterator[Tensor], count: int, objective: Objective) -> int:
        """Take in the rows of `count` examples or averages of them, and say how many rows came."""
        first = next(rows)
        self._judged = self._judge(first)
        dtype = first.dtype if self._single(self._judged) else torch.float64
        total, taken = block_moments(chain([first], rows), self.sizes, dtype=dtype)
        new = total.div_(count)
        old, decay = self.blocks, self.settings.decay
        self.blocks = new if old is None or not decay else new.mul_(1 - decay).add_(old, alpha=decay)
        self.mean_diagonal = float(self.blocks.diagonal(dim1=1, dim2=2).sum() / self.space.size)
        return taken

    def _judge(self, rows: Tensor) -> Tensor:
        """(largest tr F_b, mean of diag F) of some rows (b, n), and whether these are in float64."""
        squares, lengths = rows.double().square().mean(0), torch.tensor(self.sizes, device=rows.device)
        spread = float(torch.segment_reduce(squares, "sum", lengths=lengths).max())
        return torch.tensor([spread, float(squares.mean()), float(rows.dtype == torch.float64)], dtype=torch.float64)

    def _single(self, judged: Tensor) -> bool:
        """Whether products of float32 do not lose too much at this damping, as far as some rows tell."""
        spread, mean, double = judged.tolist()
        scale = mean if self.settings.damping_scale == "relative" else 1.0
        return not double and spread < SINGLE_PRECISION_RANGE * self.settings.damping * scale

    @property
    def known(self) -> bool:
        """Whether there are blocks."""
        return self.blocks is not None

    def operator(self, gamma: float, device: torch.device | None) -> LinearOperator:
        """Σ, beside the blocks."""
        assert self.blocks is not None
        eye = torch.eye(self.blocks.shape[1], dtype=self.blocks.dtype, device=self.blocks.device)
        return BlockDiagonal.of_precision(self.blocks + gamma * eye, self.sizes)

    def state_dict(self) -> dict[str, Tensor]:
        """The blocks and what their precision was chosen by, once there are any."""
        if self.blocks is None or self._judged is None:
            return {} if self.blocks is None else {"blocks": self.blocks}
        single = self._judged.new_tensor([self._single(self._judged)])
        return {"blocks": self.blocks, "judged": torch.cat([self._judged, single])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self.blocks = state.get("blocks")
        self._judged = state["judged"][:-1].cpu() if "judged" in state else None

    def adoptable(self, state: Mapping[str, Tensor]) -> bool:
        """Not where the products behind the blocks were of another precision than this damping asks for.

        Too much of it would do no harm, but then a run's last digits would depend on which runs were beside it.
        """
        if "blocks" not in state:
            return True
        *judged, single = state["judged"]
        return bool(single) == self._single(torch.stack(judged))

    def state_device(self, name: str, tensor: Tensor, device: torch.device) -> torch.device:
        """All beside the model, but what is read on the host."""
        return torch.device("cpu") if name == "judged" else device

    @staticmethod
    def bytes(space: ParameterSpace, settings: BlockFisherSettings, sizes: Sequence[int]) -> int:
        """Of statistics, precision, factor and inverse of the blocks, and a batch."""
        return len(sizes) * max(sizes) ** 2 * 8 * 7 + settings.batch_bytes(space.size)
