"""The Fisher stored as its gradient rows: they take the memory of m vectors, and Woodbury's identity inverts it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sparsekit.linalg import DiagonalPlusLowRank, DirectSum, LinearOperator
from sparsekit.linalg.lowrank import PAGE_BYTES
from sparsekit.machine import available_memory
from sparsekit.methods.block_settings import BlockFisherSettings
from sparsekit.problem.objective import Objective
from sparsekit.problem.parameters import ParameterSpace


class KeptRows:
    """All m rows, from which Σ is computed where m is less than the length of a block.

    Attributes:
        mean_diagonal: of F.
    """

    def __init__(self, space: ParameterSpace, settings: BlockFisherSettings, sizes: Sequence[int]) -> None:
        self.space, self.settings, self.sizes = space, settings, list(sizes)
        self.mean_diagonal = 0.0
        self.rows: Tensor | None = None  # (m, n)

    def take(self, rows: Iterator[Tensor], count: int, objective: Objective) -> int:
        """Keep `count` rows; return the number of rows."""
        self.rows = None  # freed before the same amount is allocated
        where = self.place(objective.device, count, objective.dtype)
        kept = torch.empty(count, self.space.size, dtype=objective.dtype, device=where)
        done, squares = 0, torch.zeros((), dtype=torch.float64, device=objective.device)
        for batch in rows:
            kept[done : done + len(batch)] = batch
            for row in batch:  # a row at a time: all in double precision would take twice their memory
                squares += row.double().square().sum()
            done += len(batch)
        self.rows, self.mean_diagonal = kept, float(squares) / count / self.space.size
        return done

    def place(self, device: torch.device, count: int, dtype: torch.dtype) -> torch.device:
        """The device of the rows while the model is on `device`."""
        where = self.settings.rows_on
        if where == "auto" and device.type not in ("cpu", "meta"):
            needed = count * self.space.size * dtype.itemsize + self.beside(self.space, self.settings, self.sizes)
            where = "device" if needed < 0.8 * available_memory(device).device else "host"
        return torch.device("cpu") if where == "host" else device

    @property
    def known(self) -> bool:
        """Whether there has been an update."""
        return self.rows is not None

    def operator(self, gamma: float, device: torch.device | None) -> LinearOperator:
        """Σ for vectors on `device`."""
        assert self.rows is not None
        parts = [
            DiagonalPlusLowRank.of_precision(columns, gamma, len(self.rows), device=device)
            for columns in self.rows.split(self.sizes, dim=1)
        ]
        return parts[0] if len(parts) == 1 else DirectSum(parts)

    def state_dict(self) -> dict[str, Tensor]:
        """The rows, after an update."""
        return {} if self.rows is None else {"rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self.rows = state.get("rows")

    def adoptable(self, state: Mapping[str, Tensor]) -> bool:
        """True: rows do not depend on the damping."""
        return True

    def state_device(self, name: str, tensor: Tensor, device: torch.device) -> torch.device:
        """The device that `rows_on` names for the rows, the model's for the rest."""
        return self.place(device, len(tensor), tensor.dtype) if name == "rows" else device

    @staticmethod
    def bytes(space: ParameterSpace, settings: BlockFisherSettings) -> int:
        """Bytes of the rows, for a float32 model."""
        return 4 * settings.rows * space.size

    @staticmethod
    def beside(space: ParameterSpace, settings: BlockFisherSettings, sizes: Sequence[int]) -> int:
        """Bytes beside the rows: Gram matrices, pages of columns, a batch, vectors."""
        m = settings.rows
        # the factors of this cut and of the previous one, and their Gram matrices; pages of columns in float64, also
        # without the removed ones; vectors
        factors, pages = (2 * len(sizes) + 4) * m * m * 8, 4 * min(PAGE_BYTES, 8 * m * max(sizes))
        return factors + pages + settings.batch_bytes(space.size) + 8 * 16 * space.size
