"""The estimate that an audit sets beside its attack: what any attack could have got."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Integer, PRNGKeyArray

from jgia.config import AuditConfig
from jgia.models import Victim, batch_norm_names
from jgia.risk import RiskSettings, UpdateRelease, invre
from jgia.risk.configured import client_release, make_prior

PyTree = Any
_MODELED = {"adaptive_scale", "gaussian", "laplace", "clip", "dp_sgd"}
_POINTS = 64


class AuditRisk(NamedTuple):
    """What any attack could get from the update of an audit.

    Attributes:
      record: the ``risk`` of ``result.json``, without what the attack got.
      pixel_errors: (n, H, W, C) expected squared error of every pixel of the first n images.
    """

    record: dict[str, Any]
    pixel_errors: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class AmongOthers:
    """A release of a batch as a function of one of its images, for who knows the others.

    The parameters are a tuple: what was sent, the whole batch (B, H, W, C), its labels (B,), and
    which image (an index) the function is of.
    """

    release: UpdateRelease

    def __call__(
        self,
        params: tuple[PyTree, Array, Array, Array],
        image: Float[Array, "height width channels"],
        label: Array,
        /,
    ) -> PyTree:
        """The update with this image in place of the one of the index."""
        sent, images, labels, index = params
        return self.release(sent, images.at[index].set(image), labels.at[index].set(label))


def audit_risk(
    key: PRNGKeyArray,
    config: AuditConfig,
    victim: Victim,
    params: PyTree,
    images: Float[np.ndarray, "batch height width channels"],
    labels: Integer[np.ndarray, " batch"],
    *,
    public: Float[np.ndarray, "public height width channels"],
    declared_noise_std: float,
) -> AuditRisk:
    """Estimate the risk of the first images of a client's batch.

    Labels and the other images of the batch count as known: the worst case for each image. FedSGD
    averages gradients, so that an image's share of the update then is its own gradient over B;
    where images act on each other (several local steps, statistics of the batch, clipping of the
    whole) the update is a function of all of them.

    Args:
      key: random key of Monte Carlo parts.
      config: the audit's.
      victim: the model.
      params: what was sent to the client.
      images: its pixels in [0, 1].
      labels: their classes.
      public: images that the prior is made from.
      declared_noise_std: of the noise that defenses added; 0 for ``config.risk.risk_noise_std``.

    Returns:
      The record and the pixel maps.

    Raises:
      ValueError: as :func:`jgia.risk.invre`.
    """
    options = config.risk
    count, batch = options.risk_images, len(images)
    defenses = set(config.defense.defense)
    noise_std = declared_noise_std or options.risk_noise_std
    clip = config.defense.clip_norm if defenses & {"clip", "dp_sgd"} else None
    prior = make_prior(
        options.risk_prior, public, rank=min(options.risk_prior_rank, len(public) - 1)
    )
    apart = config.client.protocol == "fedsgd" and "clip" not in defenses
    apart = apart and not (batch_norm_names(victim) and _uses_batch_statistics(victim))
    release = client_release(
        config.client,
        victim,
        num_examples=1 if apart else batch,
        visible_layers=config.knowledge.visible_layers,
        clip_norm=clip,
    )
    settings = RiskSettings()
    if apart:
        found = [
            invre(
                key,
                release,
                params,
                images[:count],
                labels[:count],
                prior=prior,
                noise_std=noise_std * batch,
                settings=settings,
            )
        ]
    else:
        found = [
            invre(
                one,
                AmongOthers(release=release),
                (params, jnp.asarray(images), jnp.asarray(labels), jnp.asarray(index)),
                images[index][None],
                labels[index][None],
                prior=prior,
                noise_std=noise_std,
                settings=settings,
            )
            for index, one in enumerate(jax.random.split(key, count))
        ]
    estimates: Any = jax.tree.map(lambda *x: np.concatenate(x), *(one.estimates for one in found))
    left_out: list[str] = sorted(defenses - _MODELED - {"shaped"})
    if "shaped" in defenses:
        left_out.append("the shape of shaped noise, which counts as isotropic of the same energy")
    if "dp_sgd" in defenses and config.client.protocol == "fedavg":
        left_out.append("dp_sgd's clipping of every example")
    record = {
        "num_images": count,
        "noise_std": noise_std,
        "noise_from": "the defense" if declared_noise_std else "assumed",
        "prior": options.risk_prior,
        "prior_rank": prior.rank,
        "prior_energy": found[0].energy,
        "route": found[0].choice.route,
        "left_out": left_out,
        **_summary(found[0].layers, estimates),
    }
    return AuditRisk(
        record=record, pixel_errors=estimates.pixel_errors.reshape(count, *images.shape[1:])
    )


def with_attack(record: dict[str, Any], psnr: list[float | None]) -> dict[str, Any]:
    """The record with what the attack got of each image, in dB, beside what was predicted."""
    rows = [row | {"attack_psnr": psnr[index]} for index, row in enumerate(record["images"])]
    return record | {"images": rows}


def _uses_batch_statistics(victim: Victim) -> bool:
    return getattr(victim.module, "batch_norm", "eval") == "train"


def _summary(names: tuple[str, ...], estimates: Any) -> dict[str, Any]:
    risk = np.asarray(estimates.risk, np.float64)
    layers = np.asarray(estimates.layer_risk, np.float64)
    rows = [
        {
            "risk": _in_unit(risk[index]),
            "predicted_psnr": _finite(estimates.predicted_psnr[index]),
            "invloss": _finite(estimates.invloss[index]),
            "information": _finite(estimates.information[index]),
            "linearization_ratio": _finite(estimates.diagnostics.linearization_ratio[index]),
        }
        for index in range(len(risk))
    ]
    return {
        "mean": _in_unit(risk.mean()),
        "worst": _in_unit(risk.max()),
        "images": rows,
        "layers": {
            name: {"mean": _in_unit(layers[:, i].mean()), "worst": _in_unit(layers[:, i].max())}
            for i, name in enumerate(names)
        },
        "spectrum": _curve(np.asarray(estimates.sigma, np.float64)),
    }


def _curve(sigma: np.ndarray) -> dict[str, Any] | None:
    """The mean singular values at a few ranks; ``None`` where they were not computed."""
    if not np.isfinite(sigma).all():
        return None
    mean = sigma.mean(axis=0)
    ranks = np.unique(np.geomspace(1, len(mean), _POINTS).round().astype(int))
    return {"ranks": ranks.tolist(), "signal_over_noise": mean[ranks - 1].tolist()}


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if np.isfinite(number) else None


def _in_unit(value: float) -> float:
    return float(np.clip(value, 0.0, 1.0))
