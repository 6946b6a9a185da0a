"""Networks of the built-in tasks, and dense checkpoints for them."""

from sparsekit.models.checkpoints import load_checkpoint
from sparsekit.models.digits import DigitsNet
from sparsekit.models.resnet import CifarResNet, resnet

__all__ = ["CifarResNet", "DigitsNet", "load_checkpoint", "resnet"]
