"""The Fisher stored as its blocks: they take the memory of B vectors, and a Cholesky factor of each inverts it."""

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
        self._judged: Tensor | None = None  # figures that decide the dtype of the blocks' products

    def take(self, rows: Iterator[Tensor], count: int, objective: Objective) -> int:
        """Add the rows of `count` examples, or averages of them; return the number of rows."""
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
        """(largest tr F_b, mean of diag F, whether in float64) of some rows (b, n), as a tensor."""
        squares, lengths = rows.double().square().mean(0), torch.tensor(self.sizes, device=rows.device)
        spread = float(torch.segment_reduce(squares, "sum", lengths=lengths).max())
        return torch.tensor([spread, float(squares.mean()), float(rows.dtype == torch.float64)], dtype=torch.float64)

    def _single(self, judged: Tensor) -> bool:
        """Whether products in float32 are precise enough at this damping, judged by some rows."""
        spread, mean, double = judged.tolist()
        scale = mean if self.settings.damping_scale == "relative" else 1.0
        return not double and spread < SINGLE_PRECISION_RANGE * self.settings.damping * scale

    @property
    def known(self) -> bool:
        """Whether there has been an update."""
        return self.blocks is not None

    def operator(self, gamma: float, device: torch.device | None) -> LinearOperator:
        """Σ, on the device of the blocks."""
        assert self.blocks is not None
        eye = torch.eye(self.blocks.shape[1], dtype=self.blocks.dtype, device=self.blocks.device)
        return BlockDiagonal.of_precision(self.blocks + gamma * eye, self.sizes)

    def state_dict(self) -> dict[str, Tensor]:
        """The blocks and the figures that decided their dtype, after an update."""
        if self.blocks is None or self._judged is None:
            return {} if self.blocks is None else {"blocks": self.blocks}
        single = self._judged.new_tensor([self._single(self._judged)])
        return {"blocks": self.blocks, "judged": torch.cat([self._judged, single])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self.blocks = state.get("blocks")
        self._judged = state["judged"][:-1].cpu() if "judged" in state else None

    def adoptable(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the products behind the blocks are in the dtype that this damping needs.

        A more precise dtype would do no harm, but then a run's last digits would depend on the runs before it.
        """
        if "blocks" not in state:
            return True
        *judged, single = state["judged"]
        return bool(single) == self._single(torch.stack(judged))

    def state_device(self, name: str, tensor: Tensor, device: torch.device) -> torch.device:
        """The model's device, except for the figures that are read on the host."""
        return torch.device("cpu") if name == "judged" else device

    @staticmethod
    def bytes(space: ParameterSpace, settings: BlockFisherSettings, sizes: Sequence[int]) -> int:
        """Bytes of statistics, precision, factor and inverse of the blocks, and of a batch."""
        return len(sizes) * max(sizes) ** 2 * 8 * 7 + settings.batch_bytes(space.size)
