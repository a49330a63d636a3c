"""Victims and problems of the gradient-matching benchmark, and their files for the peer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jgia.federated import client_update
from jgia.models import (
    Victim,
    flatten_params,
    flattened_features,
    layers,
    make_victim,
    with_buffers,
)
from jgia.models.normalizing import BatchNorm, Buffers, statistics_of
from jgia.normalization import Normalization
from jgia.observation import Observation

CIFAR = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CNN6 = ((12, 4, 2, 2), (36, 3, 2, 1), (36, 3, 1, 1), (36, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1))
_CONVNET = (1, 2, 2, 4, 4, 4, 4, 4)
_POOLED = (5, 7)  # of the ConvNet's convolutions, counted from 0


class Cnn6(nn.Module):
    """The six LeakyReLU convolutions and the linear head of R-GAP (Zhu and Blaschko, ICLR 2021)."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Inputs (B, H, W, C) to logits."""
        for i, (width, size, stride, pad) in enumerate(_CNN6):
            x = nn.Conv(
                width,
                (size, size),
                (stride, stride),
                padding=((pad, pad), (pad, pad)),
                use_bias=False,
                name=f"conv{i + 1}",
            )(x)
            x = nn.leaky_relu(x, 0.2)
        return nn.Dense(self.num_classes, name="head")(x.reshape((x.shape[0], -1)))


class ConvNet64(nn.Module):
    """Eight 3x3 convolutions with batch normalization, two 3x3 maxima, linear head.

    The ConvNet of Geiping et al. 2020, at width 64.
    """

    num_classes: int = 10
    width: int = 64
    mode: layers.BatchNormMode = "eval"
    buffers: Buffers = ()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Inputs (B, H, W, C) to logits."""
        for i, multiple in enumerate(_CONVNET):
            x = nn.Conv(
                self.width * multiple, (3, 3), padding=((1, 1), (1, 1)), name=f"conv{i + 1}"
            )(x)
            name = f"norm{i + 1}"
            x = BatchNorm(self.mode, *statistics_of(self.buffers, name), name=name)(x)
            x = nn.relu(x)
            if i in _POOLED:
                batch, rows, columns, channels = x.shape
                rows, columns = rows // 3, columns // 3
                x = x[:, : 3 * rows, : 3 * columns]
                x = x.reshape(batch, rows, 3, columns, 3, channels).max(axis=(2, 4))
        return nn.Dense(self.num_classes, name="head")(x.reshape((x.shape[0], -1)))


def victim_of(model: str, side: int = 32) -> Victim:
    """A model of the benchmark by name."""
    shape = (side, side, 3)
    if model == "cnn6":
        return Victim(Cnn6(), shape, 10, CIFAR, model)
    if model == "convnet64":
        return Victim(ConvNet64(), shape, 10, CIFAR, model)
    sizes: dict[str, Any] = {"input_shape": shape, "num_classes": 10, "normalization": CIFAR}
    if model == "resnet18":
        return make_victim("resnet18", stem="cifar" if side < 128 else "imagenet", **sizes)
    if model == "resnet18_small":
        small = make_victim("resnet", widths=(16, 32, 64, 128), blocks=2, head="pool", **sizes)
        return dataclasses.replace(small, name=model)
    if model == "convnet":
        return make_victim("convnet", **sizes)
    return make_victim("lenet", **sizes)


def untrained(model: str, images: np.ndarray, side: int = 32) -> tuple[Victim, Any]:
    """A fresh victim and its parameters; running statistics are those of some images.

    LeNet's weights are uniform in [-1/2, 1/2], as Zhu et al. 2019 start it.
    """
    victim = victim_of(model, side)
    params = jax.jit(victim.init)(jax.random.key(0))
    if model == "lenet":
        rng = np.random.default_rng(0)
        draw = lambda leaf: jnp.asarray(rng.uniform(-0.5, 0.5, leaf.shape), leaf.dtype)  # noqa: E731
        params = jax.tree.map(draw, params)
    return with_statistics(victim, params, images), params


def with_statistics(victim: Victim, params: Any, images: np.ndarray) -> Victim:
    """Running statistics of batch normalizations, layer by layer, from a batch of images."""
    if isinstance(victim.module, ConvNet64):
        train = dataclasses.replace(victim, module=victim.module.clone(mode="train"))
    elif getattr(victim.module, "norm", None) == "batch":
        train = dataclasses.replace(victim, module=victim.module.clone(batch_norm="train"))
    else:
        return victim
    inputs = victim.normalization.normalize(images)
    moments = jax.jit(train.batch_statistics)(params, inputs)
    found = {name: (np.asarray(mean), np.asarray(var)) for name, (mean, var) in moments.items()}
    if not isinstance(victim.module, ConvNet64):
        return with_buffers(victim, found)
    buffers = tuple(
        (name, tuple(mean.tolist()), tuple(var.tolist())) for name, (mean, var) in found.items()
    )
    return dataclasses.replace(victim, module=victim.module.clone(buffers=buffers))


def observe(victim: Victim, params: Any, images: np.ndarray, labels: np.ndarray) -> Observation:
    """What an honest-but-curious server holds that was given the labels."""
    dtype = jax.tree.leaves(params)[0].dtype
    seen = client_update(jax.random.key(0), victim, params, images.astype(dtype), labels)
    threat = dataclasses.replace(
        seen.threat_model, server="honest_but_curious", labels=tuple(int(n) for n in labels)
    )
    return dataclasses.replace(seen, threat_model=threat)


# ---- the same for the peer


def export(
    path: Path, observation: Observation, images: np.ndarray, start: np.ndarray, model: str
) -> None:
    """Weights, update, images and starting point in PyTorch's axes, under this library's names."""
    victim = observation.victim
    described = _described(victim)
    features = _features(victim)
    assert observation.threat_model.labels is not None
    arrays: dict[str, Any] = {
        "labels": np.asarray(observation.threat_model.labels),
        "inputs": np.asarray(victim.normalization.normalize(images)),
        "start": start,
        "about": json.dumps(
            {
                "model": model,
                "layers": described,
                "num_classes": victim.num_classes,
                "mean": victim.normalization.mean,
                "std": victim.normalization.std,
            }
        ),
    }
    for part, tree in (("param", observation.params), ("update", observation.update)):
        head = True
        for name, leaf in _in_order(tree, described):
            turned = np.asarray(leaf)
            if turned.ndim == 4:
                turned = turned.transpose(3, 2, 0, 1)
            elif turned.ndim == 2 and head:
                head = False  # flattened in the order height, width, channel; there channel first
                turned = turned.reshape(*features, -1).transpose(3, 2, 0, 1)
                turned = turned.reshape(len(turned), -1)
            elif turned.ndim == 2:
                turned = turned.T
            arrays[f"{part}/{name}"] = np.ascontiguousarray(turned)
    for layer in _flat(described):
        if layer["kind"] == "batch_norm" and layer["mean"]:
            arrays[f"mean/{layer['name']}"] = np.asarray(layer["mean"], np.float32)
            arrays[f"var/{layer['name']}"] = np.asarray(layer["var"], np.float32)
    np.savez(path, **arrays)


def _in_order(tree: Any, described: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """Parameters by the order of their layers."""
    position = {layer["name"]: i for i, layer in enumerate(_flat(described))}
    flat = flatten_params(tree)
    return sorted(flat.items(), key=lambda item: position[item[0].rpartition("/")[0]])


def _flat(described: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for layer in described:
        found += _flat(layer["branch"] + layer["shortcut"]) if "branch" in layer else [layer]
    return found


def _features(victim: Victim) -> tuple[int, int, int]:
    """(H, W, C) before the first fully connected layer."""
    if isinstance(victim.module, Cnn6):
        return 5, 5, _CNN6[-1][0]
    if isinstance(victim.module, ConvNet64):
        rows = victim.input_shape[0] // 9
        return rows, rows, victim.module.width * _CONVNET[-1]
    return flattened_features(victim)[1]


def _described(victim: Victim) -> list[dict[str, Any]]:
    """The layers as plain data."""
    if isinstance(victim.module, Cnn6):
        found = []
        for i, (_, _, stride, pad) in enumerate(_CNN6, start=1):
            found += [_conv(f"conv{i}", stride, pad), _activation("leaky_relu")]
        return [*found, {"kind": "dense", "name": "head"}]
    if isinstance(victim.module, ConvNet64):
        found = []
        for i in range(len(_CONVNET)):
            name = f"norm{i + 1}"
            mean, var = statistics_of(victim.module.buffers, name)
            norm = {"kind": "batch_norm", "name": name, "mean": mean, "var": var}
            found += [_conv(f"conv{i + 1}", 1, 1), norm, _activation("relu")]
            if i in _POOLED:
                found.append(
                    {"kind": "pool", "name": "max", "window": 3, "stride": 3, "padding": 0}
                )
        return [*found, {"kind": "dense", "name": "head"}]
    return _plain(victim.layers())


def _plain(described: Sequence[layers.Layer]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    pending = "none"  # an activation that waits for the normalization behind its convolution
    for layer in described:
        if isinstance(layer, layers.Conv):
            found.append(_conv(layer.name, layer.stride, layer.kernel_size[0] // 2))
            pending = layer.activation
            if layer.normalized:
                continue
        elif isinstance(layer, layers.BatchNorm):
            norm = {"kind": "batch_norm", "mean": layer.mean, "var": layer.var}
            found.append(norm | {"name": layer.name})
        elif isinstance(layer, layers.GroupNorm):
            found.append({"kind": "group_norm", "name": layer.name, "groups": layer.groups})
        elif isinstance(layer, layers.Pool):
            sizes = {"window": layer.window, "stride": layer.stride, "padding": layer.padding}
            found.append({"kind": "pool", "name": layer.kind} | sizes)
        elif isinstance(layer, layers.Residual):
            branches = {"branch": _plain(layer.branch), "shortcut": _plain(layer.shortcut)}
            found.append({"kind": "residual", "activation": layer.activation} | branches)
        else:
            found.append({"kind": "dense", "name": layer.name})
            pending = layer.activation
        if pending != "none":
            found.append(_activation(pending))
            pending = "none"
    return found


def _conv(name: str, stride: int, padding: int) -> dict[str, Any]:
    return {"kind": "conv", "name": name, "stride": stride, "padding": padding}


def _activation(name: str) -> dict[str, Any]:
    return {"kind": "activation", "name": name}
