"""Loss functions as likelihoods: the loss, its labels' distribution, and its curvature in the outputs."""

from sparsekit.likelihoods.base import Likelihood, Reduction
from sparsekit.likelihoods.categorical import Categorical, LogProbabilities
from sparsekit.likelihoods.recognition import Loss, Unspecified, as_likelihood
from sparsekit.likelihoods.units import Bernoulli, Gaussian

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
    "LogProbabilities",
    "Loss",
    "Reduction",
    "Unspecified",
    "as_likelihood",
]
