"""The components that the core registers, through the same hooks as any plugin."""

from collections.abc import Sequence

from sparsekit.methods.estimators import DiagonalFisher, Identity
from sparsekit.methods.interfaces import CurvatureEstimator, Pattern, Saliency, Schedule, Task
from sparsekit.methods.loss_models import LinearModel, OptimalBrainDamage, QuadraticModel
from sparsekit.methods.measured_rates import MeasuredRates
from sparsekit.methods.patterns import NM, Block, Uniform, Unstructured
from sparsekit.methods.saliencies import Magnitude, OptimalBrainSurgeon, Random, RowSurgeon
from sparsekit.methods.schedules import Cubic, Exponential, Linear, OneShot
from sparsekit.registry.hookspecs import hookimpl
from sparsekit.tasks import Cifar10, Digits, DigitsTransformer, ImageNet, Mnist, MnistAutoencoder, TinyImageNet


@hookimpl
def sparsekit_estimators() -> Sequence[type[CurvatureEstimator]]:
    """`identity` and `diagonal`."""
    return [Identity, DiagonalFisher]


@hookimpl
def sparsekit_saliencies() -> Sequence[type[Saliency]]:
    """`magnitude`, `random`, `obs`, `obs-rows`, `linear-model`, `quadratic-model` and `obd`."""
    return [Magnitude, Random, OptimalBrainSurgeon, RowSurgeon, LinearModel, QuadraticModel, OptimalBrainDamage]


@hookimpl
def sparsekit_schedules() -> Sequence[type[Schedule]]:
    """`one-shot`, `cubic`, `linear` and `exponential`."""
    return [OneShot, Cubic, Linear, Exponential]


@hookimpl
def sparsekit_patterns() -> Sequence[type[Pattern]]:
    """`unstructured`, `uniform`, `measured-rates`, `n:m` and `block`."""
    return [Unstructured, Uniform, MeasuredRates, NM, Block]


@hookimpl
def sparsekit_tasks() -> Sequence[type[Task]]:
    """`digits`, `digits-transformer`, `mnist`, `autoencoder`, `cifar10`, `tinyimagenet` and `imagenet`."""
    return [Digits, DigitsTransformer, Mnist, MnistAutoencoder, Cifar10, TinyImageNet, ImageNet]
