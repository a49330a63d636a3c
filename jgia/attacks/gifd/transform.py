"""What a client's defense did to its gradient, as far as the shared update itself shows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jgia.models import Dense, Pool, Residual, Victim, flatten_params, unflatten_params
from jgia.observation import Observation

PyTree = Any

_NOTABLE = 0.01  # share of zeros that whole rows and columns do not explain
_GAP = 4.0  # of the 10 % quantile of what is left to the smallest of it
_FEWEST = 256  # entries of an array that can tell: of fewer, the smallest may not be small


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transform:
    """The attacker's own copy of the defense: ``T'`` of an update.

    Attributes:
      masks: by the flat name of a parameter, what to keep of it (1) or not (0); entries that no
        mask names stay.
      bound: the largest length of an update, or ``None``.
    """

    masks: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    bound: Array | None = None

    def apply(self, update: PyTree) -> PyTree:
        """An update as the client's defense would have shared it; linear but for the bound.

        Args:
          update: a pytree; linear maps of updates are masked alike.
        """
        flat = flatten_params(update)
        for name, mask in self.masks.items():
            flat[name] = flat[name] * mask
        if self.bound is not None:
            length = jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in flat.values()))
            factor = jnp.minimum(1, self.bound / jnp.where(length == 0, 1, length))
            flat = {name: leaf * factor for name, leaf in flat.items()}
        return unflatten_params(flat)


def estimate_transform(
    observation: Observation, *, bound: bool = False
) -> tuple[Transform, dict[str, Any]]:
    r"""Read a defense off the shared update, and nothing else: never off what it declares.

    - *Sparsification*: entries that are exactly zero, where what is left has a smallest magnitude
      that many come close to (the tenth smallest in a hundred is less than four times the
      smallest). Gradients that were not thresholded have entries down to rounding. Then every
      zero of the update is masked: ``T'(g) = g [g* != 0]``. Rounding to few levels looks alike.
    - *Soteria*: rows of the head's kernel, one per feature, that are zero although the layer before
      has a gradient for that feature. Then the feature was not zero: its row was removed.
    - *Clipping*: ``bound = ||g*||`` if asked for. Cosine distances do not change under it.
    - *Noise*: cannot be replayed; the identity.

    Args:
      observation: the update and the model's architecture.
      bound: whether to bound lengths, for distances that see them. An update that was not clipped
        is indistinguishable from one that was.

    Returns:
      (transform, what was found, JSON-ready: ``found`` in words, shares per parameter).

    Edge cases:
      Units behind a ReLU that no example activates have zero rows too, in the client's and in the
      attacker's update alike. They are told apart as above and left: comparing zeros with zeros is
      evidence. Where less than about 3 % of the entries were removed nothing is seen, and nothing
      is lost. Masking them would be harmless, and is what happens under sparsification. Where
      features are not units of the layer before (a flattened map), zero rows cannot be told from
      dead ones, and are masked.

    References:
      Li et al., "Auditing Privacy Defenses in Federated Learning via Generative Gradient Leakage"
      (CVPR 2022, arXiv 2203.15696), section 4.3 (gradient transformation estimation), which masks
      every zero.
    """
    flat = {name: np.asarray(leaf) for name, leaf in flatten_params(observation.update).items()}
    shares = {name: float(np.mean(leaf == 0)) if leaf.size else 0.0 for name, leaf in flat.items()}
    record: dict[str, Any] = {"zero_shares": shares}
    words, masks = [], {}
    if _thresholded(flat):
        masks = {name: leaf != 0 for name, leaf in flat.items() if shares[name]}
        total = sum(leaf.size for leaf in flat.values())
        zeros = sum(int(np.sum(leaf == 0)) for leaf in flat.values())
        words.append(f"small entries were removed: {zeros} of {total} are zero and masked")
    else:
        found = _pruned_features(observation.victim, flat)
        if found is not None:
            name, kept, told_apart = found
            masks = {name: np.broadcast_to(kept[:, None], flat[name].shape)}
            record["features_masked"] = int(np.sum(~kept))
            unsure = "" if told_apart else ", or dead"
            words.append(
                f"features of {name} were pruned{unsure}: {int(np.sum(~kept))} of {kept.size} rows "
                "are zero and masked"
            )
    length = float(
        np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in flat.values()))
    )
    record["length"] = length
    if bound:
        words.append(f"lengths are bounded by that of the update, {length:.3g}")
    record["found"] = "; ".join(words) or "nothing that can be replayed"
    dtype = next(iter(flat.values())).dtype
    transform = Transform(
        {name: jnp.asarray(mask, dtype) for name, mask in masks.items()},
        jnp.asarray(length, dtype) if bound else None,
    )
    return transform, record


def _thresholded(flat: Mapping[str, np.ndarray]) -> bool:
    """Whether small entries are missing from most of the entries that can tell."""
    agree = against = 0
    for leaf in flat.values():
        rest = _unexplained(np.abs(leaf))
        left = rest[rest != 0]
        if left.size < _FEWEST:
            continue
        notable = 1 - left.size / rest.size >= _NOTABLE
        if notable and np.quantile(left, 0.1) < _GAP * left.min():
            agree += rest.size
        elif notable:
            against += rest.size
    return agree > against


def _unexplained(sizes: np.ndarray) -> np.ndarray:
    """An array without its zero rows and columns, as one of inputs times outputs."""
    matrix = sizes.reshape(-1, sizes.shape[-1]) if sizes.ndim else sizes.reshape(1, 1)
    matrix = matrix[:, matrix.any(axis=0)]
    return matrix[matrix.any(axis=1)]


def _pruned_features(
    victim: Victim, flat: Mapping[str, np.ndarray]
) -> tuple[str, np.ndarray, bool] | None:
    """(name of the head's kernel, which features were kept, whether dead ones were told apart)."""
    try:
        layers = victim.layers()
    except ValueError:
        return None
    head = layers[-1]
    name = f"{head.name}/kernel" if isinstance(head, Dense) else ""
    if name not in flat:
        return None
    zero = np.all(flat[name] == 0, axis=1)
    active = _active_units(layers[:-1], flat, len(zero))
    kept = ~zero if active is None else ~(zero & active)
    return None if kept.all() else (name, kept, active is not None)


def _active_units(layers: Any, flat: Mapping[str, np.ndarray], count: int) -> np.ndarray | None:
    """Which units of the layer before the head have a gradient; ``None`` if it has other units."""
    before = [layer for layer in layers if not isinstance(layer, Pool)]
    if not before:
        return None
    last = before[-1]
    part = last.branch[-1] if isinstance(last, Residual) else last
    owner = "" if isinstance(part, Pool) else part.name
    leaves = [leaf for name, leaf in flat.items() if name.rpartition("/")[0] == owner]
    if not leaves or any(leaf.shape[-1] != count for leaf in leaves):
        return None
    return np.any([leaf.reshape(-1, count).any(axis=0) for leaf in leaves], axis=0)
