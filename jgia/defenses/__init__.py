"""Defenses of a client against leakage, with the noise that each declares.

Those that act on what is shared are ``optax.GradientTransformation``, so that ``optax.chain``
composes them; :class:`Defense` puts them and those that act on images, activations and single
examples together for :func:`jgia.federated.client_update`.
"""

from jgia.defenses._adaptive_gradient import AdaptiveStats
from jgia.defenses._noise import NoiseState
from jgia.defenses.accounting import dp_sgd_epsilon, gaussian_delta, gaussian_epsilon
from jgia.defenses.adaptive_scale import (
    adaptive_scale_noise,
    layer_scales_for_target,
    scale_for_target,
)
from jgia.defenses.augmentation import augment
from jgia.defenses.censor import CensorState, censor_update
from jgia.defenses.clipping import ClipState, clip_update
from jgia.defenses.coordinate import CoordinateNoise, coordinate_noise
from jgia.defenses.defense import Defense, declared_noise_std, make_defense
from jgia.defenses.detector import THRESHOLDS, DetectionReport, detect_crafted
from jgia.defenses.dp_sgd import DpSgdStats, dp_sgd_gradient, dp_sgd_noise_std
from jgia.defenses.dropout import DropoutLoss
from jgia.defenses.gaussian import gaussian_noise
from jgia.defenses.laplace import laplace_noise
from jgia.defenses.quantization import (
    NearestState,
    StochasticState,
    quantize_nearest,
    quantize_stochastic,
)
from jgia.defenses.shaped import (
    ShapedNoise,
    ShapedNoiseState,
    input_noise,
    shaped_noise,
    shaped_noise_transformation,
)
from jgia.defenses.soteria import soteria, soteria_scores
from jgia.defenses.sparsification import SparsityState, keep_top_k

__all__ = [
    "THRESHOLDS",
    "AdaptiveStats",
    "CensorState",
    "ClipState",
    "CoordinateNoise",
    "Defense",
    "DetectionReport",
    "DpSgdStats",
    "DropoutLoss",
    "NearestState",
    "NoiseState",
    "ShapedNoise",
    "ShapedNoiseState",
    "SparsityState",
    "StochasticState",
    "adaptive_scale_noise",
    "augment",
    "censor_update",
    "clip_update",
    "coordinate_noise",
    "declared_noise_std",
    "detect_crafted",
    "dp_sgd_epsilon",
    "dp_sgd_gradient",
    "dp_sgd_noise_std",
    "gaussian_delta",
    "gaussian_epsilon",
    "gaussian_noise",
    "input_noise",
    "keep_top_k",
    "laplace_noise",
    "layer_scales_for_target",
    "make_defense",
    "quantize_nearest",
    "quantize_stochastic",
    "scale_for_target",
    "shaped_noise",
    "shaped_noise_transformation",
    "soteria",
    "soteria_scores",
]
