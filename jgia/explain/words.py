"""What each defense does to the Jacobian and to the noise, in words."""

from __future__ import annotations

from typing import NamedTuple

from jgia.config.explain import CoordinateOptions, Explained, SoteriaOptions


class Effect(NamedTuple):
    """One defense as a transformation of (J, C).

    Attributes:
      jacobian: what becomes of J.
      covariance: what becomes of C.
      caveat: what the prediction leaves out, or an empty string.
    """

    jacobian: str
    covariance: str
    caveat: str = ""


EFFECTS: dict[str, Effect] = {
    "none": Effect("J", "C = tau^2 I, the noise that is there in any case"),
    "gaussian": Effect("unchanged", "C + s^2 I: hides directions of singular values below s"),
    "laplace": Effect(
        "unchanged",
        "C + 2 b^2 I, as Gaussian noise of that variance",
        "its Fisher information is 1 / b^2 an entry, twice a Gaussian's of the same variance: an "
        "attack that uses the density can come down to the least error, none below it",
    ),
    "clip": Effect(
        "(c / ||g||) (I - g g' / ||g||^2) J: every singular value scaled, one direction lost",
        "unchanged",
    ),
    "dp_sgd": Effect(
        "every example's block as under clip, over the batch size", "C + (z c / B)^2 I"
    ),
    "top_k": Effect(
        "rows of the small entries deleted; no singular value grows",
        "unchanged",
        "which entries were kept tells more, and is not counted",
    ),
    "quantize": Effect(
        "unchanged",
        "C + step^2 / 12 on the entries of each array",
        "rounding to the nearest level is no noise: entries below half a step vanish as a whole, "
        "others hardly move",
    ),
    "quantize_stochastic": Effect(
        "unchanged",
        "C + step^2 / 6: the mean of f (1 - f) step^2 over places f between two levels",
        "an entry has no noise at a level and step^2 / 4 half way; small entries have less than "
        "the mean",
    ),
    "dropout": Effect(
        "that of the masked network: rows of dropped features are zero",
        "unchanged",
        "the attacker is told the mask, and the figures are means over masks",
    ),
    "augment": Effect(
        "J_G J_T, with T what was done to the image",
        "unchanged",
        "the attacker is told the draw, and the figures are means over draws; the error is "
        "measured against the original image",
    ),
    "adaptive_scale": Effect("unchanged", "C + tau^2 I, tau such that its own target is met"),
    "shaped": Effect(
        "unchanged",
        "C + J Xi J' + t^2 I: strongest along the weakest singular directions",
        "the attacker is told the covariance at the true image, more than it would know",
    ),
    "input_noise": Effect(
        "unchanged",
        "C + J Xi J': noise on the pixels, seen through J",
        "no attack does better than on the noisy image, whatever the network",
    ),
    "coordinate": Effect(
        "unchanged",
        "C + diag(s_j^2), s_j^2 in proportion to ||J_j|| / |g_j|",
        "the attacker is told every s_j",
    ),
    "soteria": Effect(
        "rows of one layer deleted where its inputs give most away for their size",
        "unchanged",
        "all other layers are shared as before: see the risk of each layer",
    ),
}


def name_of(defense: Explained | None) -> str:
    """The key of a defense in :data:`EFFECTS`."""
    if defense is None:
        return "none"
    if isinstance(defense, SoteriaOptions):
        return "soteria"
    if isinstance(defense, CoordinateOptions):
        return "coordinate"
    return defense.defense[0]


def options_of(defense: Explained | None) -> str:
    """Name and knobs in one line.

    >>> options_of(SoteriaOptions(layer="fc1"))
    'soteria(layer=fc1, keep_fraction=0.4)'
    """
    if defense is None:
        return "none"
    if isinstance(defense, SoteriaOptions):
        return f"soteria(layer={defense.layer}, keep_fraction={defense.keep_fraction:g})"
    if isinstance(defense, CoordinateOptions):
        return f"coordinate(noise_std={defense.noise_std:g})"
    return defense.words()
