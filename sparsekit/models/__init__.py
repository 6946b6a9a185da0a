"""Networks of the built-in tasks, and dense checkpoints for them."""

from sparsekit.models.autoencoder import Autoencoder
from sparsekit.models.checkpoints import load_checkpoint, read_state_dict
from sparsekit.models.digits import DigitsNet
from sparsekit.models.lenet import lenet
from sparsekit.models.resnet import CifarResNet, resnet
from sparsekit.models.resnet18 import resnet18
from sparsekit.models.transformer import SequenceClassifier

__all__ = [
    "Autoencoder",
    "CifarResNet",
    "DigitsNet",
    "SequenceClassifier",
    "lenet",
    "load_checkpoint",
    "read_state_dict",
    "resnet",
    "resnet18",
]
