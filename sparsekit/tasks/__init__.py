"""The built-in tasks."""

from sparsekit.tasks.autoencoder import MnistAutoencoder
from sparsekit.tasks.cifar10 import Cifar10
from sparsekit.tasks.digits import Digits
from sparsekit.tasks.imagenet import ImageNet
from sparsekit.tasks.mnist import Mnist
from sparsekit.tasks.tinyimagenet import TinyImageNet
from sparsekit.tasks.transformer import DigitsTransformer

__all__ = ["Cifar10", "Digits", "DigitsTransformer", "ImageNet", "Mnist", "MnistAutoencoder", "TinyImageNet"]
