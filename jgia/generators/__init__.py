"""Generators that can be entered at any block, and their training.

:class:`StagedGenerator` is what an attack needs of one. :class:`StyleGAN2` and :class:`BigGAN`
satisfy it; :func:`train_generator` trains the first, :func:`load_prior` reads a trained one. Names
are imported on first use: an attack that takes the protocol from here loads neither data nor
training.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jgia.generators.augmentation import augment as augment
    from jgia.generators.biggan import BigGAN as BigGAN
    from jgia.generators.biggan import standing_statistics as standing_statistics
    from jgia.generators.discriminator import Discriminator as Discriminator
    from jgia.generators.prior import Prior as Prior
    from jgia.generators.prior import PriorError as PriorError
    from jgia.generators.prior import bundled_priors as bundled_priors
    from jgia.generators.prior import load_prior as load_prior
    from jgia.generators.prior import save_prior as save_prior
    from jgia.generators.protocol import GeneratorState as GeneratorState
    from jgia.generators.protocol import Side as Side
    from jgia.generators.protocol import StagedGenerator as StagedGenerator
    from jgia.generators.stylegan2 import StyleGAN2 as StyleGAN2
    from jgia.generators.stylegan2 import style_statistics as style_statistics
    from jgia.generators.training import PriorTrainingError as PriorTrainingError
    from jgia.generators.training import Report as Report
    from jgia.generators.training import TrainedGenerator as TrainedGenerator
    from jgia.generators.training import train_generator as train_generator

_EXPORTS = {
    "BigGAN": "biggan",
    "Discriminator": "discriminator",
    "GeneratorState": "protocol",
    "Prior": "prior",
    "PriorError": "prior",
    "PriorTrainingError": "training",
    "Report": "training",
    "Side": "protocol",
    "StagedGenerator": "protocol",
    "StyleGAN2": "stylegan2",
    "TrainedGenerator": "training",
    "augment": "augmentation",
    "bundled_priors": "prior",
    "load_prior": "prior",
    "save_prior": "prior",
    "standing_statistics": "biggan",
    "style_statistics": "stylegan2",
    "train_generator": "training",
}

__all__ = sorted(_EXPORTS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"jgia.generators.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'jgia.generators' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
