"""Networks of the built-in tasks, and dense checkpoints for them."""

from sparsekit.models.autoencoder import Autoencoder
from sparsekit.models.checkpoints import load_checkpoint, read_state_dict
from sparsekit.models.digits import DigitsNet
from sparsekit.models.lenet import lenet
from sparsekit.models.preact_resnet18 import preact_resnet18
from sparsekit.models.resnet import CifarResNet, resnet
from sparsekit.models.resnet18 import resnet18
from sparsekit.models.transformer import SequenceClassifier
from sparsekit.models.vgg11 import vgg11

__all__ = [
    "Autoencoder",
    "CifarResNet",
    "DigitsNet",
    "SequenceClassifier",
    "lenet",
    "load_checkpoint",
    "preact_resnet18",
    "read_state_dict",
    "resnet",
    "resnet18",
    "vgg11",
]
