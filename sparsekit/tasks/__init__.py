"""The built-in tasks."""

from sparsekit.tasks.cifar10 import Cifar10
from sparsekit.tasks.digits import Digits

__all__ = ["Cifar10", "Digits"]
