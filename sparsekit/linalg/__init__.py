"""Symmetric positive definite operators on Rⁿ: their products, solves, diagonals and constrained minima."""

from sparsekit.linalg.iterative import ConjugateGradients, conjugate_gradients
from sparsekit.linalg.operator import ConstrainedMinimum, LinearOperator
from sparsekit.linalg.structured import (
    BlockDiagonal,
    Diagonal,
    DirectSum,
    KroneckerDiagonal,
    Principal,
)

__all__ = [
    "BlockDiagonal",
    "ConjugateGradients",
    "ConstrainedMinimum",
    "Diagonal",
    "DirectSum",
    "KroneckerDiagonal",
    "LinearOperator",
    "Principal",
    "conjugate_gradients",
]
