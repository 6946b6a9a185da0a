"""Loss functions as likelihoods: the loss, its labels' distribution, and its curvature in the outputs."""

from sparsekit.problem.likelihoods.base import Likelihood, Reduction
from sparsekit.problem.likelihoods.categorical import Categorical, LogProbabilities
from sparsekit.problem.likelihoods.recognition import Loss, Unspecified, as_likelihood
from sparsekit.problem.likelihoods.units import Bernoulli, Gaussian

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
