"""Clients, victims and searches of the GIFD benchmark, and one search scored against the truth."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jgia.config import DefenseConfig
from jgia.data import load_dataset
from jgia.defenses import make_defense, soteria, soteria_scores
from jgia.federated import client_update
from jgia.generators.prior import Prior, load_prior
from jgia.generators.stylegan2 import StyleGAN2
from jgia.models import Victim, make_victim
from jgia.normalization import Normalization
from jgia.observation import Observation
from jgia.training import load_victim

PyTree = Any

KEY = 11
MOST_CLIENTS = 128
_POOL = 1200  # images of a data set that clients are taken from, at most


class Method(NamedTuple):
    """One way to search, with everything that decides what it finds.

    Attributes:
      name: in tables.
      kind: ``"pixel"`` (Inverting Gradients), ``"gifd"``, ``"gias"``, ``"ggl"`` or ``"mapping"``.
      steps: of each restart, all stages together.
      options: replace single ones of the kind's; ``start`` is the generator's start of styles.
    """

    name: str
    kind: str
    steps: int
    options: dict[str, Any]


class Case(NamedTuple):
    """A method against clients of one sort.

    Attributes:
      method: what searches.
      data: specification of the images; that of the command line when ``None``.
      batch: images of a client, of distinct classes.
      defense: what the client does, as :func:`defended` reads it.
    """

    method: Method
    data: str | None = None
    batch: int = 1
    defense: str = "none"

    @property
    def name(self) -> str:
        """Unique in a section."""
        parts = [self.method.name]
        parts += [] if self.data is None else [data_name(self.data)]
        parts += [] if self.batch == 1 else [f"B={self.batch}"]
        parts += [] if self.defense == "none" else [self.defense]
        return " | ".join(parts)

    def record(self) -> dict[str, Any]:
        """What decides the rows, JSON-ready and without paths."""
        fields = self._asdict() | {"data": None if self.data is None else data_name(self.data)}
        options = {
            k: list(v) if isinstance(v, tuple) else v for k, v in self.method.options.items()
        }
        return fields | {"method": self.method._asdict() | {"options": options}}


def data_name(spec: str) -> str:
    """A specification without folders."""
    kind, colon, rest = spec.partition(":")
    if kind not in ("npz", "folder"):
        return spec
    return f"{kind}{colon}{rest.replace(chr(92), '/').rsplit('/', 1)[-1]}"


@dataclasses.dataclass(frozen=True)
class GaussianStart(StyleGAN2):
    """A generator whose searches start from styles drawn layer by layer from a Gaussian."""

    def draw(self, *arguments: Any, **options: Any) -> Any:
        """As that of the generator, another start."""
        return super().draw(*arguments, **{"start": "gaussian"} | options)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A prior, a victim, and clients.

    Attributes:
      prior: of the attacker.
      victim: the model.
      params: that the server sent.
      data: where clients' images come from.
    """

    prior: Prior
    victim: Victim
    params: PyTree
    data: str

    def client(self, spec: str | None, batch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Images (B, H, W, C) that nobody trained on, and their labels (B,)."""
        found = _clients(spec or self.data, self.victim, batch)
        if index >= len(found):
            raise ValueError(
                f"{data_name(spec or self.data)} has images for {len(found)} clients with "
                f"{batch} each, got client {index}; give more images or fewer --victims."
            )
        return found[index]

    def observe(self, images: np.ndarray, labels: np.ndarray, defense: str) -> Observation:
        """What an honest-but-curious server holds that is told neither labels nor the defense."""
        key = jax.random.key(KEY)
        config, prune = defended(defense)
        seen = client_update(
            key, self.victim, self.params, images, labels, defense=make_defense(config)
        )
        threat = dataclasses.replace(
            seen.threat_model,
            server="honest_but_curious",
            labels=None,
            defense="none",
            noise_std=0.0,
        )
        update = seen.update
        if prune:
            update = _pruned(self.victim, self.params, images, update, prune)
        return dataclasses.replace(seen, update=update, threat_model=threat)


def make_problem(prior: str, victim: str, trained: str | None, data: str) -> Problem:
    """What the command line names.

    Args:
      prior: as for :func:`jgia.generators.prior.load_prior`; ``"untrained"`` for random parameters
        of `tiny32`, ``"untrained8"`` for a tiny one of 8 pixels, ``"untrained8c"`` for one of ten
        classes.
      victim: ``"small"``, ``"resnet18"`` or ``"tiny"``.
      trained: folder of ``jgia train-victim``, instead of ``victim``.
      data: of clients.
    """
    if prior.startswith("untrained"):
        generator = StyleGAN2()
        if prior.startswith("untrained8"):
            sizes: dict[str, Any] = {"latent_dim": 8, "style_dim": 8, "max_features": 8}
            classes = 10 if prior.endswith("c") else 0
            generator = StyleGAN2(resolution=8, base=64, num_classes=classes, **sizes)
        params = jax.jit(generator.init)(jax.random.key(0))
        loaded = Prior(name=prior, generator=generator, params=params)
    else:
        loaded = load_prior(prior)
    if trained is not None:
        model, params = load_victim(trained)
        return Problem(loaded, model, params, data)
    model = victim_of(victim, loaded.generator.resolution)
    return Problem(loaded, model, jax.jit(model.init)(jax.random.key(1)), data)


def victim_of(name: str, side: int) -> Victim:
    """``small``: three residual blocks without normalization, 78 thousand parameters.

    ``tiny``: a fully connected one that compiles quickly.
    """
    sizes: dict[str, Any] = {
        "input_shape": (side, side, 3),
        "num_classes": 10,
        "normalization": Normalization((0.5,) * 3, (0.25,) * 3),
    }
    if name == "resnet18":
        return make_victim("resnet18", **sizes)
    if name == "tiny":
        return make_victim("mlp", widths=(16,), **sizes)
    small = make_victim(
        "resnet", widths=(16, 32, 64), strides=(2, 2, 2), norm="none", head="pool", **sizes
    )
    return dataclasses.replace(small, name="resnet_small")


@functools.lru_cache(maxsize=32)
def _clients(spec: str, victim: Victim, batch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of distinct classes, in the order of the data; public images are left out."""
    shape, classes = victim.input_shape, victim.num_classes
    dataset = load_dataset(spec, image_size=shape[0], limit=_POOL)
    public = np.zeros(len(dataset), bool) if dataset.public is None else dataset.public
    rows = [int(row) for row in np.flatnonzero(~np.asarray(public))]
    labels = dataset.labels % classes
    found = []
    while len(found) < MOST_CLIENTS:
        chosen: list[int] = []
        for row in rows:
            taken = {int(labels[i]) for i in chosen}
            # Where there are fewer classes than images, some come twice.
            if int(labels[row]) not in taken or len(taken) == min(classes, dataset.num_classes):
                chosen.append(row)
            if len(chosen) == batch:
                break
        if len(chosen) < batch:
            break
        gone = set(chosen)
        rows = [row for row in rows if row not in gone]
        images, _ = dataset.take(chosen)
        found.append((in_color(images, shape[-1]), labels[chosen]))
    return found


def in_color(images: np.ndarray, channels: int) -> np.ndarray:
    """Gray images with their only channel repeated."""
    return images.repeat(channels, axis=-1) if images.shape[-1] < channels else images


def defended(defense: str) -> tuple[DefenseConfig, float]:
    """Read ``noise 0.5`` (of the root mean square), ``clip 0.1``, ``top_k 0.1``, ``soteria 0.2``.

    Returns:
      (options of the client's defense, share of the head's rows that Soteria keeps or 0).
    """
    name, _, value = defense.partition(" ")
    if name == "noise":
        level = float(value)
        return DefenseConfig(defense=("gaussian",), noise_std=level, noise_relative=True), 0.0
    if name == "clip":
        return DefenseConfig(defense=("clip",), clip_norm=float(value)), 0.0
    if name == "top_k":
        options: Any = {"keep_fraction": float(value), "sparsity_scope": "layer"}
        return DefenseConfig(defense=("top_k",), **options), 0.0
    if name == "soteria":
        return DefenseConfig(), float(value)
    if name != "none":
        raise ValueError(f"there is no defense {defense!r} in this benchmark.")
    return DefenseConfig(), 0.0


def _pruned(
    victim: Victim, params: PyTree, images: np.ndarray, update: PyTree, keep: float
) -> PyTree:
    """Soteria: the head's rows of the least telling features are removed."""
    width = jnp.shape(params["head"]["kernel"])[0]
    head = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}
    before = victim.module.clone(num_classes=width)  # what enters the head leaves it

    def features(inputs: Array) -> Array:
        return before.apply({"params": {**params, "head": head}}, inputs)  # pyright: ignore[reportReturnType]

    inputs = jnp.asarray(victim.normalization.normalize(images))
    scores = jax.jit(lambda x: soteria_scores(features, x))(inputs)
    return soteria(update, scores, layer="head", keep_fraction=keep)[0]
