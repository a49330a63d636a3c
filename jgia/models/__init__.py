"""Victim models: flax.linen modules behind one frozen description, ``Victim``."""

from jgia.models.buffers import with_batch_norm, with_buffers
from jgia.models.cnn import CNN
from jgia.models.convnet import ConvNet
from jgia.models.imprint_block import ImprintBlock
from jgia.models.layers import (
    BatchNorm,
    Conv,
    Dense,
    GroupNorm,
    Layer,
    Pool,
    Residual,
    flattened_features,
    output_shape,
)
from jgia.models.lenet import LeNet
from jgia.models.make import make_victim
from jgia.models.mlp import MLP
from jgia.models.resnet import ResNet
from jgia.models.smoothing import smooth_activations
from jgia.models.vgg import VGG
from jgia.models.victim import Victim, batch_norm_names, flatten_params, unflatten_params

__all__ = [
    "CNN",
    "MLP",
    "VGG",
    "BatchNorm",
    "Conv",
    "ConvNet",
    "Dense",
    "GroupNorm",
    "ImprintBlock",
    "Layer",
    "LeNet",
    "Pool",
    "ResNet",
    "Residual",
    "Victim",
    "batch_norm_names",
    "flatten_params",
    "flattened_features",
    "make_victim",
    "output_shape",
    "smooth_activations",
    "unflatten_params",
    "with_batch_norm",
    "with_buffers",
]
