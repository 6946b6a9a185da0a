"""Symmetric positive definite operators on Rⁿ: their products, solves, diagonals and constrained minima.

Every operator is Σ, and `solve` gives products with H = Σ⁻¹. Those that are made from H are made by `of_precision`;
the plain constructors of `Diagonal` and `KroneckerDiagonal` take Σ.
"""

from sparsekit.linalg.blocks import BlockDiagonal
from sparsekit.linalg.diagonal import Diagonal
from sparsekit.linalg.directsum import DirectSum
from sparsekit.linalg.elimination import check_pivots, eliminate
from sparsekit.linalg.iterative import ConjugateGradients, conjugate_gradients
from sparsekit.linalg.kronecker import KroneckerDiagonal, kronecker_product, kronecker_sandwich
from sparsekit.linalg.lowrank import DiagonalPlusLowRank
from sparsekit.linalg.matrixfree import MatrixFree
from sparsekit.linalg.operator import ConstrainedMinimum, Iteration, LinearOperator
from sparsekit.linalg.principal import Principal
from sparsekit.linalg.repeated import RepeatedBlock
from sparsekit.linalg.rescaled import Rescaled

__all__ = [
    "BlockDiagonal",
    "ConjugateGradients",
    "ConstrainedMinimum",
    "Diagonal",
    "DiagonalPlusLowRank",
    "DirectSum",
    "Iteration",
    "KroneckerDiagonal",
    "LinearOperator",
    "MatrixFree",
    "Principal",
    "RepeatedBlock",
    "Rescaled",
    "check_pivots",
    "conjugate_gradients",
    "eliminate",
    "kronecker_product",
    "kronecker_sandwich",
]
