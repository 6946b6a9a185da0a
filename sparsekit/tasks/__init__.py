"""The built-in tasks."""

from sparsekit.tasks.autoencoder import MnistAutoencoder
from sparsekit.tasks.cifar10 import Cifar10
from sparsekit.tasks.digits import Digits
from sparsekit.tasks.mnist import Mnist
from sparsekit.tasks.transformer import DigitsTransformer

__all__ = ["Cifar10", "Digits", "DigitsTransformer", "Mnist", "MnistAutoencoder"]
