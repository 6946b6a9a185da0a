"""What is measured from an objective: gradient rows and products with the Fisher. No inverse is taken here."""

from sparsekit.curvature.products import GaussNewton
from sparsekit.curvature.rows import gradient_rows, per_example_gradients

__all__ = ["GaussNewton", "gradient_rows", "per_example_gradients"]
