"""Networks of the built-in tasks, and dense checkpoints for them."""

from sparsekit.models.autoencoder import Autoencoder
from sparsekit.models.checkpoints import load_checkpoint, read_state_dict
from sparsekit.models.digits import DigitsNet
from sparsekit.models.resnet import CifarResNet, resnet
from sparsekit.models.transformer import SequenceClassifier

__all__ = [
    "Autoencoder",
    "CifarResNet",
    "DigitsNet",
    "SequenceClassifier",
    "load_checkpoint",
    "read_state_dict",
    "resnet",
]
