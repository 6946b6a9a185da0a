"""The solution of a layer's regression from its moments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsekit.errors import CurvatureError
from sparsekit.linalg import KroneckerDiagonal, LinearOperator, RepeatedBlock
from sparsekit.reconstruction.moments import Moments

#: Largest number of inputs at which each row's system is factorised; beyond, rows are solved by conjugate gradients.
DIRECT = 1024

#: With an output weighting, survivors k of a group of (out, in) weights are solved for by one factorisation where
#: k³ ≤ SURVIVORS (out² in + out in²): about what thirty steps of conjugate gradients take.
SURVIVORS = 500

#: Added to an output weighting B, relative to the mean of its diagonal, so that no output has weight zero.
OUTPUT_DAMPING = 1.0


class Solution(NamedTuple):
    """The solution of a regression.

    Attributes:
        weights: (g, out, in); the last input is the bias's where it is fitted.
        before: the weights before the fit, in the same units.
        scale: of the constant input of the bias; None: no bias is fitted.
        iterations, residual: of the solve; the residual of the normal equations, relative to their right side.
    """

    weights: Tensor
    before: Tensor
    scale: float | None
    iterations: int
    residual: float


def solve(
    W: Tensor, kept: Tensor, B: Tensor | None, moments: Moments, *, biased: bool, ridge: float, smallest_ridge: float
) -> Solution:
    """Minimise E ‖W x̂ − z‖²_B + λ ‖W − W_now‖² over the kept weights.

    Args:
        W: (g, out, in), the present weights; with `biased` the last input is the bias's.
        kept: (g, out, in) bool.
        B: (g, out, out); None for the identity.
        moments: of the fitted examples.
        biased: whether the last input is constant.
        ridge: λ in units of the mean of Â's diagonal.
        smallest_ridge: the least λ in these units, given by the rounding of the products.

    Raises:
        CurvatureError: it cannot be solved.
    """
    scale = None
    if biased:
        # The bias is the weight of a constant input as large as the others, so that the ridge treats it alike.
        plain = moments.means(None)[0].diagonal(dim1=1, dim2=2)[:, :-1]
        scale = float(plain.mean().sqrt()) or 1.0
        W = torch.cat([W[:, :, :-1], W[:, :, -1:] / scale], dim=2)
    A, C, _ = moments.means(scale)
    diagonal = A.diagonal(dim1=1, dim2=2)
    free = kept & (diagonal > 0)[:, None]  # inputs that are always zero determine nothing
    if not bool(free.any()):
        return Solution(W, W, scale, 0, 0.0)
    gradient = W @ A - C
    gradient = gradient if B is None else B @ gradient
    damping = max(ridge, smallest_ridge) * float(diagonal.mean())
    outputs, inputs = W.shape[1:]
    try:
        if B is not None and int(free.sum((1, 2)).max()) ** 3 <= SURVIVORS * (
            outputs**2 * inputs + outputs * inputs**2
        ):
            step, iterations = _of_survivors(A, B, damping, free, gradient), 0
        else:
            minimum = _operator(A, B, damping, outputs).minimise(
                ~free.flatten(), torch.zeros_like(W).flatten(), gradient.flatten()
            )
            step, iterations = minimum.solution.view_as(W), minimum.iterations
    except CurvatureError:
        raise CurvatureError(
            f"its regression cannot be solved; raise reconstruction.ridge from {ridge:g}, or give "
            "more reconstruction.examples"
        ) from None
    moved = step @ A
    left = (gradient + (moved if B is None else B @ moved) + damping * step)[free]
    right = float(gradient[free].norm())
    residual = float(left.norm()) / right if right > 0 else 0.0
    return Solution(W + step, W, scale, iterations, residual)


def _of_survivors(A: Tensor, B: Tensor, damping: float, free: Tensor, gradient: Tensor) -> Tensor:
    """The step −((B ⊗ Â + λI)_SS)⁻¹ gradient_S of each group, (g, out, in), S its free coordinates.

    Raises:
        CurvatureError: a matrix is not positive definite.
    """
    step = torch.zeros_like(gradient)
    for group, mine in enumerate(free):
        rows, columns = mine.nonzero(as_tuple=True)
        H = A[group][columns][:, columns].mul_(B[group][rows][:, rows])
        H.diagonal().add_(damping)
        L, failed = torch.linalg.cholesky_ex(H)
        if int(failed):
            raise CurvatureError("the matrix of the survivors is not positive definite")
        step[group, rows, columns] = -torch.cholesky_solve(gradient[group, rows, columns, None], L)[:, 0]
    return step


def _operator(A: Tensor, B: Tensor | None, ridge: float, outputs: int) -> LinearOperator:
    """(B ⊗ Â + λI)⁻¹ on the rows of all groups, group after group."""
    if B is None and A.shape[1] <= DIRECT:
        damped = A + ridge * torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
        return RepeatedBlock.of_precision(damped, outputs)
    inner, U = torch.linalg.eigh(A)
    outer, V = torch.ones(*A.shape[:1], outputs, dtype=A.dtype, device=A.device), None
    if B is not None:
        outer, V = torch.linalg.eigh(B)
    spectrum = outer.clamp_min(0)[:, :, None] * inner.clamp_min(0)[:, None, :] + ridge
    return KroneckerDiagonal([V, U], spectrum.reciprocal(), orthogonal=True)


def output_weighting(B: Tensor, start: int, stop: int, W: Tensor) -> Tensor | None:
    """B, (g, out, out), for rows `start` to `stop` of a weight, with mean diagonal one; None where it is zero.

    Args:
        B: for the whole weight, in its own groups, such as the three of a packed projection, one of which a layer uses.
        start: the first row.
        stop: one past the last row.
        W: (g, out, in), for its shape, type and device.
    """
    whole, outputs = torch.block_diag(*B.to(W))[start:stop, start:stop], W.shape[1]
    B = torch.stack([whole[i : i + outputs, i : i + outputs] for i in range(0, stop - start, outputs)])
    unit = B.diagonal(dim1=1, dim2=2).mean()
    if not float(unit) > 0:
        return None
    eye = torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
    return (B / unit + OUTPUT_DAMPING * eye) / (1 + OUTPUT_DAMPING)
