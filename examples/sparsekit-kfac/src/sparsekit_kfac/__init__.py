"""K-FAC for sparsekit: the Fisher of a layer as a Kronecker product of two small matrices."""

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from sparsekit import CurvatureError, CurvatureEstimator, EstimatorSettings, InverseFisher, Objective, hookimpl
from sparsekit.curvature import fisher_diagonal, kronecker_factors, layer_gradients_memory
from sparsekit.linalg import Diagonal, DirectSum, KroneckerDiagonal, LinearOperator

#: The version of sparsekit's interfaces that this is written for.
SPARSEKIT_INTERFACE = 1


# --8<-- [start:settings]
class KfacSettings(EstimatorSettings):
    """Settings of `kfac`; examples, batch size, Fisher and damping are inherited."""

    decay: float = Field(0.0, ge=0, lt=1, description="share of the former factors that a refresh keeps")


# --8<-- [end:settings]
# --8<-- [start:update]
class Kfac(CurvatureEstimator[KfacSettings]):
    """F of a weight ≈ B ⊗ A: A of its inputs, B of its outputs' gradients. Other parameters get their diagonal."""

    name = "kfac"
    Settings = KfacSettings
    #: What the kit is to expect of it: B ⊗ A has the Fisher's trace on average only, and its diagonal about.
    conformance = {"trace": (0.5, 2.0), "correlation": 0.7, "tolerance": 1e-6}

    def __init__(self, space, settings):
        super().__init__(space, settings)
        self.state: dict[str, Tensor] = {}

    def update(self, objective: Objective, *, generator: torch.Generator) -> Mapping[str, float]:
        draws = generator.get_state()
        new: dict[str, Tensor] = {}
        for name, factors in kronecker_factors(objective, self.settings.fisher, generator=generator).items():
            new |= {f"{name}.inputs": factors.inputs, f"{name}.outputs": factors.outputs}
        rest = [info for info in self.space.parameters if f"{info.name}.inputs" not in new]
        if rest:  # embeddings, gains of normalisations: no product of two matrices
            generator.set_state(draws)  # the same labels for all parameters
            diagonal = fisher_diagonal(objective, self.settings.fisher, generator=generator).double()
            new |= {f"{info.name}.diagonal": diagonal[info.slice] for info in rest}
        if not all(bool(tensor.isfinite().all()) for tensor in new.values()):
            raise CurvatureError("a gradient is not finite; check the data, the loss and the weights")
        old, keep = self.state, self.settings.decay
        self.state = {name: keep * old[name] + (1 - keep) * value if old else value for name, value in new.items()}
        return {"mean_diagonal": self._mean_diagonal()}

    # --8<-- [end:update]
    # --8<-- [start:inverse]
    def inverse(self, damping: float | None = None) -> InverseFisher:
        if not self.state:
            raise CurvatureError("the estimator has seen no examples; call update first")
        gamma = self.resolve_damping(damping, self._mean_diagonal())
        return InverseFisher(DirectSum([self._part(info.name, gamma) for info in self.space.parameters]), gamma)

    def _part(self, name: str, gamma: float) -> LinearOperator:
        if f"{name}.diagonal" in self.state:
            return Diagonal((self.state[f"{name}.diagonal"] + gamma).reciprocal())
        (b, U), (a, V) = (torch.linalg.eigh(self.state[f"{name}.{factor}"]) for factor in ("outputs", "inputs"))
        eigenvalues = b.clamp_min(0)[:, :, None] * a.clamp_min(0)[:, None, :]  # of B ⊗ A, group by group
        return KroneckerDiagonal([U, V], (eigenvalues + gamma).reciprocal(), orthogonal=True)

    # --8<-- [end:inverse]
    # --8<-- [start:rest]
    def _mean_diagonal(self) -> float:
        traces = {
            name: tensor.diagonal(dim1=-2, dim2=-1).sum(-1) for name, tensor in self.state.items() if tensor.dim() == 3
        }
        total = sum(float(value.sum()) for name, value in self.state.items() if name.endswith(".diagonal"))
        for info in self.space.parameters:
            if f"{info.name}.inputs" in traces:
                total += float((traces[f"{info.name}.inputs"] * traces[f"{info.name}.outputs"]).sum())
        return total / self.space.size

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.state = dict(state)

    @classmethod
    def memory(cls, space, settings) -> int:
        sizes = (info.size + info.shape[0] ** 2 + (info.size // info.shape[0]) ** 2 for info in space.parameters)
        return 64 * sum(sizes) + layer_gradients_memory(space, settings.batch_size)


@hookimpl
def sparsekit_estimators() -> Sequence[type[CurvatureEstimator]]:
    return [Kfac]


# --8<-- [end:rest]
