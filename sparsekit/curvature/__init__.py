"""What is measured from an objective: gradient rows, their moments, Fisher products. No inverse is taken here."""

from sparsekit.curvature.fisher_diagonal import fisher_diagonal
from sparsekit.curvature.inputs import input_moments, input_moments_memory, layer_groups
from sparsekit.curvature.kronecker_factors import KroneckerFactors, kronecker_factors
from sparsekit.curvature.layers import LayerGradients, layer_gradients_memory
from sparsekit.curvature.moments import averaged_rows, block_moments
from sparsekit.curvature.passes import layer_gradients
from sparsekit.curvature.products import GaussNewton
from sparsekit.curvature.rows import gradient_rows, per_example_gradients
from sparsekit.curvature.sums import RunningSum, SharedSum

__all__ = [
    "GaussNewton",
    "KroneckerFactors",
    "LayerGradients",
    "RunningSum",
    "SharedSum",
    "averaged_rows",
    "block_moments",
    "fisher_diagonal",
    "gradient_rows",
    "input_moments",
    "input_moments_memory",
    "kronecker_factors",
    "layer_gradients",
    "layer_gradients_memory",
    "layer_groups",
    "per_example_gradients",
]
