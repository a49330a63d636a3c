"""Victim models: flax.linen modules behind one frozen description, ``Victim``."""

from jgia.models.cnn import CNN
from jgia.models.convnet import ConvNet
from jgia.models.lenet import LeNet
from jgia.models.mlp import MLP
from jgia.models.victim import (
    Conv,
    Dense,
    Victim,
    flatten_params,
    make_victim,
    unflatten_params,
)

__all__ = [
    "CNN",
    "MLP",
    "Conv",
    "ConvNet",
    "Dense",
    "LeNet",
    "Victim",
    "flatten_params",
    "make_victim",
    "unflatten_params",
]
