"""The built-in curvature estimators: the identity, the diagonal, and the base of those on blocks of the Fisher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sparsekit.curvature import averaged_rows, block_moments, gradient_rows
from sparsekit.curvature.vectors import FisherKind
from sparsekit.errors import CurvatureError, DataError
from sparsekit.linalg import BlockDiagonal, Diagonal, DiagonalPlusLowRank, DirectSum, LinearOperator
from sparsekit.linalg.lowrank import PAGE_BYTES, SINGLE_PRECISION_RANGE
from sparsekit.machine import Memory
from sparsekit.methods.interfaces import CurvatureEstimator, EstimatorSettings
from sparsekit.problem.objective import Objective, some
from sparsekit.problem.parameters import ParameterSpace
from sparsekit.removal import InverseFisher


class IdentitySettings(EstimatorSettings):
    """Settings of `identity`."""

    examples: int = Field(
        0,
        ge=0,
        description="training examples that the loss is measured on before and after a cut; 0: none, but where "
        "something else takes them",
    )


class Identity(CurvatureEstimator):
    """F = I: every weight counts alike. OBS saliency on it is magnitude, compensation moves nothing."""

    name: ClassVar[str] = "identity"
    Settings: ClassVar[type[EstimatorSettings]] = IdentitySettings

    @classmethod
    def unit(cls, settings: Any) -> Literal["loss", "other", "layer"]:
        """Squared weights."""
        return "other"

    def __init__(self, space: ParameterSpace, settings: EstimatorSettings) -> None:
        super().__init__(space, settings)
        self._like: Tensor | None = None

    def update(self, objective: Objective, *, generator: torch.Generator) -> Mapping[str, float]:
        """Nothing to learn; only the device and type of number are taken note of."""
        self._like = torch.empty(0, dtype=objective.dtype, device=objective.device)
        return {}

    def inverse(self, damping: float | None = None) -> InverseFisher:
        """Σ = I / (1 + γ)."""
        if self._like is None:
            raise CurvatureError("the estimator has seen no examples; call update first")
        gamma = self.resolve_damping(damping, 1.0)
        return InverseFisher(Diagonal(self._like.new_full((self.space.size,), 1 / (1 + gamma))), gamma)

    def state_dict(self) -> dict[str, Tensor]:
        """One empty tensor that knows device and type, once there is one."""
        return {} if self._like is None else {"like": self._like}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self._like = state.get("like")

    @classmethod
    def memory(cls, space: ParameterSpace, settings: Any) -> int:
        """One vector."""
        return 4 * space.size


class DiagonalFisherSettings(EstimatorSettings):
    """Settings of `diagonal`."""

    decay: float = Field(
        0.0, ge=0, lt=1, description="weight of earlier estimates at a refresh; 0: each refresh starts afresh"
    )


class DiagonalFisher(CurvatureEstimator):
    """Σ_ii = 1/(F_ii + γ). OBS on it is Optimal Brain Damage up to damping (LeCun et al., 1990)."""

    name: ClassVar[str] = "diagonal"
    Settings: ClassVar[type[EstimatorSettings]] = DiagonalFisherSettings

    def __init__(self, space: ParameterSpace, settings: DiagonalFisherSettings) -> None:
        super().__init__(space, settings)
        self._diagonal: Tensor | None = None

    def update(self, objective: Objective, *, generator: torch.Generator) -> Mapping[str, float]:
        """F_ii from the squares of gradient rows, mixed with what was known by `decay`."""
        total = torch.zeros(self.space.size, dtype=torch.float64, device=objective.device)
        for rows in gradient_rows(objective, self.settings.fisher, generator=generator):
            total += rows.square().sum(0)
        new = (total / some(objective.count())).to(objective.dtype)
        old, decay = self._diagonal, self.settings.decay
        self._diagonal = new if old is None else decay * old + (1 - decay) * new
        return {"mean_diagonal": float(self._diagonal.double().mean())}

    def inverse(self, damping: float | None = None) -> InverseFisher:
        """Σ = diag(1/(F + γ))."""
        if self._diagonal is None:
            raise CurvatureError("the estimator has seen no examples; call update first")
        gamma = self.resolve_damping(damping, float(self._diagonal.double().mean()))
        return InverseFisher(Diagonal((self._diagonal + gamma).reciprocal()), gamma)

    def state_dict(self) -> dict[str, Tensor]:
        """The diagonal, once there is one."""
        return {} if self._diagonal is None else {"diagonal": self._diagonal}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self._diagonal = state.get("diagonal")

    @classmethod
    def memory(cls, space: ParameterSpace, settings: Any) -> int:
        """The diagonal twice (float64 while accumulating), and one batch of rows."""
        return space.size * (8 + 4 + 4 * settings.batch_size)


class BlockFisherSettings(EstimatorSettings):
    """Settings of estimators on blocks of the Fisher."""

    fisher: FisherKind = Field("empirical", description="the data's own labels, as published; or importance, …")
    block_size: int | None = Field(50, ge=1, description="B, consecutive weights in one block; null: as long as can be")
    across_layers: bool = Field(False, description="whether a block may cross the end of a tensor")
    average: int = Field(
        1, ge=1, description="b, examples whose gradients are averaged to one row; must divide examples"
    )
    store: Literal["auto", "rows", "blocks"] = Field(
        "auto", description="what is kept: all m rows, or B × B blocks; auto: rows where m < B"
    )
    rows_on: Literal["auto", "device", "host"] = Field(
        "auto",
        description="where rows lie; paged in from the host; auto: host where the device is too small",
    )
    decay: float = Field(
        0.0, ge=0, lt=1, description="weight of earlier estimates at a refresh (blocks only); 0: starts afresh"
    )

    @model_validator(mode="after")
    def _consistent(self) -> BlockFisherSettings:
        if "examples" in self.model_fields_set and self.examples % self.average:
            fits = max(self.examples // self.average, 1) * self.average
            raise ValueError(f"average={self.average} must divide examples={self.examples}; examples={fits} would do")
        if self.fisher == "exact" and (self.average > 1 or self.store == "rows"):
            raise ValueError("the exact Fisher has several rows an example: use average=1 and store=blocks or auto")
        if self.decay and self.store == "rows":
            raise ValueError("rows start afresh at a refresh: use decay=0 or store=blocks")
        return self

    def fitting(self, available: int) -> int:
        """Whole rows of `average` examples."""
        return available // self.average * self.average

    @property
    def rows(self) -> int:
        """The number of rows of one estimate, m (for one row an example)."""
        return self.examples // self.average

    def keeps_rows(self, longest: int) -> bool:
        """Whether rows are kept rather than blocks, `longest` being the longest block."""
        if self.store == "auto":
            return self.fisher != "exact" and not self.decay and self.rows < longest
        return self.store == "rows"


class BlockFisher(CurvatureEstimator):
    """H_b = (1/m) Σ_j g_j g_jᵀ + γI on blocks of consecutive weights, inverted exactly.

    Optimal Brain Surgeon on blocks (oBERT), WoodFisher and M-FAC all invert this matrix: by a rank-one recursion in
    m steps as published, here by what the sizes ask for. Where B ≤ m the statistics Σ g gᵀ are kept and a batched
    Cholesky factorisation in float64 inverts them, so that another damping, a mask or more gradients cost nothing
    else. Where m < B the m rows are kept and Woodbury's identity inverts them in the memory of the rows, O(mP).

    A plugin gives the class a name, and the settings their published defaults.
    """

    Settings: ClassVar[type[EstimatorSettings]] = BlockFisherSettings
    memory_settings: ClassVar[tuple[str, ...]] = ("block_size", "examples")

    def __init__(self, space: ParameterSpace, settings: BlockFisherSettings) -> None:
        super().__init__(space, settings)
        self._sizes = space.stretches(settings.block_size, across_tensors=settings.across_layers)
        self._lengths = torch.tensor(self._sizes)
        self._keeps_rows = settings.keeps_rows(max(self._sizes))
        self._device: torch.device | None = None
        self._blocks: Tensor | None = None  # (m, B, B), F on the blocks
        self._rows: Tensor | None = None  # (m, n)
        self._mean_diagonal = 0.0
        self._judged: Tensor | None = None  # what the precision of the blocks' products was chosen by
        self._inverse: InverseFisher | None = None

    def update(self, objective: Objective, *, generator: torch.Generator) -> Mapping[str, float]:
        """Take the objective's examples in, batch by batch."""
        settings, examples = self.settings, some(objective.count())
        if examples % settings.average:
            raise DataError(
                f"the data gave {examples} examples, which average={settings.average} does not divide: give "
                f"{examples // settings.average * settings.average or settings.average} or set estimator.average=1"
            )
        self._inverse = None
        rows = gradient_rows(objective, settings.fisher, generator=generator)
        rows = averaged_rows(rows, settings.average)
        self._device = objective.device
        if self._keeps_rows:
            count = self._take_rows(rows, examples // settings.average, objective)
        else:
            first = next(rows)
            self._judged = self._judge(first)
            dtype = first.dtype if self._single(self._judged) else torch.float64
            total, count = block_moments(chain([first], rows), self._sizes, dtype=dtype)
            new = total.div_(examples // settings.average)
            old, decay = self._blocks, settings.decay
            self._blocks = new if old is None or not decay else new.mul_(1 - decay).add_(old, alpha=decay)
            self._mean_diagonal = float(self._blocks.diagonal(dim1=1, dim2=2).sum() / self.space.size)
        return {
            "mean_diagonal": self._mean_diagonal,
            "examples": float(examples),
            "rows": float(count),
            "average": float(settings.average),
        }

    def _judge(self, rows: Tensor) -> Tensor:
        """(largest tr F_b, mean of diag F) of some rows (b, n), and whether these are in float64."""
        squares = rows.double().square().mean(0)
        spread = float(torch.segment_reduce(squares, "sum", lengths=self._lengths.to(rows.device)).max())
        return torch.tensor([spread, float(squares.mean()), float(rows.dtype == torch.float64)], dtype=torch.float64)

    def _single(self, judged: Tensor) -> bool:
        """Whether products of float32 do not lose too much at this damping, as far as some rows tell."""
        spread, mean, double = judged.tolist()
        scale = mean if self.settings.damping_scale == "relative" else 1.0
        return not double and spread < SINGLE_PRECISION_RANGE * self.settings.damping * scale

    def adopt(self, state: Mapping[str, Tensor]) -> bool:
        """Not where the products behind the blocks were of another precision than this damping asks for.

        Too much of it would do no harm, but then a run's last digits would depend on which runs were beside it.
        """
        if "blocks" in state:
            *judged, single = state["judged"]
            if bool(single) != self._single(torch.stack(judged)):
                return False
        return super().adopt(state)

    def _take_rows(self, rows: Iterable[Tensor], count: int, objective: Objective) -> int:
        self._rows = None  # freed before as much again is allocated
        where = self._place(objective.device, count, objective.dtype)
        kept = torch.empty(count, self.space.size, dtype=objective.dtype, device=where)
        done, squares = 0, 0.0
        for batch in rows:
            kept[done : done + len(batch)] = batch
            squares += sum(float(row.double().square().sum()) for row in batch)
            done += len(batch)
        self._rows, self._mean_diagonal = kept, squares / count / self.space.size
        return done

    def _place(self, device: torch.device, count: int, dtype: torch.dtype) -> torch.device:
        where = self.settings.rows_on
        if where == "auto" and device.type == "cuda":
            needed = count * self.space.size * dtype.itemsize + self._beside_rows(self.space, self.settings)
            where = "device" if needed < 0.8 * torch.cuda.mem_get_info(device)[0] else "host"
        return torch.device("cpu") if where == "host" else device

    def inverse(self, damping: float | None = None) -> InverseFisher:
        """Σ, from the rows or blocks taken in."""
        if self._rows is None and self._blocks is None:
            raise CurvatureError("the estimator has seen no examples; call update first")
        gamma = self.resolve_damping(damping, self._mean_diagonal)
        if self._inverse is None or self._inverse.damping != gamma:  # later cuts with the same Σ share its factors
            self._inverse = InverseFisher(self._operator(gamma), gamma)
        return self._inverse

    def _operator(self, gamma: float) -> LinearOperator:
        if self._rows is not None:
            parts = [
                DiagonalPlusLowRank.of_precision(columns, gamma, len(self._rows), device=self._device)
                for columns in self._rows.split(self._sizes, dim=1)
            ]
            return parts[0] if len(parts) == 1 else DirectSum(parts)
        assert self._blocks is not None
        eye = torch.eye(self._blocks.shape[1], dtype=self._blocks.dtype, device=self._blocks.device)
        return BlockDiagonal.of_precision(self._blocks + gamma * eye, self._sizes)

    def state_dict(self) -> dict[str, Tensor]:
        """The rows or the blocks, once there are any."""
        state = {"rows": self._rows, "blocks": self._blocks}
        found = {name: tensor for name, tensor in state.items() if tensor is not None}
        if self._judged is not None:
            single = self._judged.new_tensor([self._single(self._judged)])
            found["judged"] = torch.cat([self._judged, single])
        mean = torch.tensor(self._mean_diagonal, dtype=torch.float64, device=self._device)
        return found and {**found, "mean_diagonal": mean}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self._rows, self._blocks, self._inverse = state.get("rows"), state.get("blocks"), None
        self._judged = state["judged"][:-1].cpu() if "judged" in state else None
        if state:
            self._mean_diagonal = float(state["mean_diagonal"])
            self._device = state["mean_diagonal"].device  # beside the model always, as the rows may not be

    def state_device(self, name: str, tensor: Tensor, device: torch.device) -> torch.device:
        """Rows go where `rows_on` says, the rest beside the model."""
        if name == "judged":
            return torch.device("cpu")
        return self._place(device, len(tensor), tensor.dtype) if name == "rows" else device

    @classmethod
    def memory(cls, space: ParameterSpace, settings: Any) -> int:
        """Rows and the factors of their Gram matrices; or statistics, precision, factor and inverse of the blocks.

        Of a float32 model; in float64 rows take twice as much.
        """
        return cls._of_rows(space, settings) + cls._beside_rows(space, settings)

    @classmethod
    def _of_rows(cls, space: ParameterSpace, settings: Any) -> int:
        sizes = space.stretches(settings.block_size, across_tensors=settings.across_layers)
        return 4 * settings.rows * space.size if settings.keeps_rows(max(sizes)) else 0

    @classmethod
    def _beside_rows(cls, space: ParameterSpace, settings: Any) -> int:
        sizes = space.stretches(settings.block_size, across_tensors=settings.across_layers)
        batch = space.size * 4 * settings.batch_size * (3 if settings.average == 1 else 6)
        if settings.keeps_rows(max(sizes)):
            m = settings.rows
            # factors of a cut and of the one before it, what a factor is made of; pages of columns in float64, and
            # without those that are gone; vectors
            factors, pages = (2 * len(sizes) + 4) * m * m * 8, 4 * min(PAGE_BYTES, 8 * m * max(sizes))
            return factors + pages + batch + 8 * 16 * space.size
        return len(sizes) * max(sizes) ** 2 * 8 * 7 + batch

    @classmethod
    def check(cls, model: nn.Module, space: ParameterSpace, settings: Any, available: Memory) -> None:
        apart = settings.rows_on != "device" and available.device != available.host  # rows may lie on the host
        if not (apart and cls._of_rows(space, settings)) or (
            settings.rows_on == "auto" and cls.memory(space, settings) <= available.device
        ):
            super().check(model, space, settings, available)
            return
        cls.check_memory(available.host, settings, lambda given: cls._of_rows(space, given), space.size, "host memory")
        cls.check_memory(
            available.device, settings, lambda given: cls._beside_rows(space, given), space.size, "device memory"
        )
