"""The same GIFD search in PyTorch, in a process of its own: JSON lines in and out.

Runs under the interpreter of ``--peer-python`` and imports nothing of jgia: weights, update, start
and settings come from a file. Plain PyTorch: reverse over reverse through the victim; a projection
that sorts; what is constant in a search is computed once. ``compile`` is the whole step under
``torch.compile``.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import importlib.metadata
import json
import math
import os
import resource
import sys
import time
import warnings
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

warnings.filterwarnings("ignore")

_GAIN = math.sqrt(2)
_EPS = 1e-8


def activate(x: Any) -> Any:
    """Leaky rectifier of slope 0.2, times sqrt(2)."""
    return F.leaky_relu(x, 0.2) * _GAIN


def blur(x: Any) -> Any:
    """[1, 3, 3, 1] / 4 along each side of (B, C, 2 h + 1, 2 w + 1), to (B, C, 2 h, 2 w)."""
    x = F.pad(x, (1, 1, 1, 1))
    n, m = x.shape[2] - 3, x.shape[3] - 3
    x = x[:, :, :n] + 3 * (x[:, :, 1 : n + 1] + x[:, :, 2 : n + 2]) + x[:, :, 3:]
    x = x[..., :m] + 3 * (x[..., 1 : m + 1] + x[..., 2 : m + 2]) + x[..., 3:]
    return x / 16


def upsampled(x: Any, kernel: Any) -> Any:
    """Twice the resolution of (B, C, h, w), zeros beyond the borders."""
    batch, channels, height, width = x.shape
    flat = x.reshape(batch * channels, 1, height, width)
    flat = F.conv_transpose2d(flat, kernel, stride=2, padding=1)
    return flat.reshape(batch, channels, 2 * height, 2 * width)


class Generator:
    """StyleGAN2's synthesis, entered at any block."""

    def __init__(self, arrays: dict[str, Any], blocks: int) -> None:
        self.blocks = blocks
        self.layers: dict[str, dict[str, Any]] = {}
        for name in {key.split("/")[1] for key in arrays if key.startswith("synthesis/block")}:
            self.layers[name] = self._layer(arrays, f"synthesis/{name}")
        self.constant = arrays["synthesis/constant"].permute(2, 0, 1)[None].contiguous()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=self.constant.dtype) / 4
        self.taps = torch.outer(taps, taps)[None, None]

    @staticmethod
    def _layer(arrays: dict[str, Any], name: str) -> dict[str, Any]:
        affine, kernel = arrays[f"{name}/conv/affine/kernel"], arrays[f"{name}/conv/kernel"]
        scaled = kernel / math.sqrt(kernel[..., 0].numel())
        up = name.endswith("conv_a")
        layer = {
            "affine": (affine / math.sqrt(affine.shape[0])).T.contiguous(),
            "affine_bias": arrays[f"{name}/conv/affine/bias"],
            "energy": scaled.square().sum(dim=(0, 1)),
            "kernel": scaled.permute((2, 3, 0, 1) if up else (3, 2, 0, 1)).contiguous(),
            "bias": arrays[f"{name}/bias"][None, :, None, None],
            "up": up,
        }
        if f"{name}/noise_strength" in arrays:
            layer["strength"] = arrays[f"{name}/noise_strength"]
        return layer

    def _modulated(self, layer: dict[str, Any], x: Any, style: Any, demodulate: bool) -> Any:
        scale = F.linear(style, layer["affine"], layer["affine_bias"])
        x = x * scale[:, :, None, None]
        if layer["up"]:
            y = blur(F.conv_transpose2d(x, layer["kernel"], stride=2))
        else:
            y = F.conv2d(x, layer["kernel"], padding=layer["kernel"].shape[-1] // 2)
        if demodulate:
            restore = torch.rsqrt(scale.square() @ layer["energy"] + _EPS)
            y = y * restore[:, :, None, None]
        return y

    def _styled(self, name: str, x: Any, style: Any, noise: Any) -> Any:
        layer = self.layers[name]
        y = self._modulated(layer, x, style, True) + layer["strength"] * noise
        return activate(y + layer["bias"])

    def run(
        self, styles: Any, noise: dict[str, Any], state: Any, start: int, stop: int
    ) -> tuple[Any, Any]:
        """(features, image) that leave block ``stop - 1``."""
        x, image = state if state is not None else (None, None)
        for b in range(start, stop):
            size = 4 << b
            if b == 0:
                x = self.constant.expand(len(styles), -1, -1, -1)
            else:
                x = self._styled(f"block{b}_conv_a", x, styles[:, b, 0], noise[f"{size}a"])
            x = self._styled(f"block{b}_conv_b", x, styles[:, b, 1], noise[f"{size}b"])
            layer = self.layers[f"block{b}_image"]
            own = self._modulated(layer, x, styles[:, b, 2], False) + layer["bias"]
            image = own if image is None else upsampled(image, self.taps) + own
        return x, image


class ResNet:
    """Residual blocks without normalization, global average, a head; as functions of weights."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.blocks = sorted({n.split("/")[0] for n in names if n.startswith("block")})

    def logits(self, weights: list[Any], x: Any) -> Any:
        """(B, 3, H, W) to (B, classes)."""
        w = dict(zip(self.names, weights, strict=True))

        def conv(name: str, x: Any, stride: int) -> Any:
            kernel = w[f"{name}/kernel"]
            return F.conv2d(x, kernel, w[f"{name}/bias"], stride, kernel.shape[-1] // 2)

        x = F.relu(conv("conv1", x, 1))
        for block in self.blocks:
            branch = conv(f"{block}/conv2", F.relu(conv(f"{block}/conv1", x, 2)), 1)
            x = F.relu(branch + conv(f"{block}/shortcut", x, 2))
        return F.linear(x.mean(dim=(2, 3)), w["head/kernel"], w["head/bias"])


def project(offset: Any, radius: float) -> Any:
    """Nearest point of every image's l1 ball, by sorting (Duchi et al., ICML 2008)."""
    flat = offset.reshape(len(offset), -1)
    sizes = flat.abs()
    ordered = sizes.sort(dim=1, descending=True).values
    excess = ordered.cumsum(dim=1) - radius
    counts = torch.arange(1, sizes.shape[1] + 1, dtype=sizes.dtype)
    last = (ordered * counts > excess).sum(dim=1, keepdim=True)
    theta = excess.gather(1, last - 1) / last
    inside = sizes.sum(dim=1, keepdim=True) <= radius
    theta = torch.where(inside, torch.zeros_like(theta), theta)
    return (flat.sign() * (sizes - theta).clamp(min=0)).reshape(offset.shape)


class Case:
    """One exported problem, and the search."""

    def __init__(self, path: str, options: dict[str, Any]) -> None:
        dtype = torch.float64 if options.get("dtype") == "float64" else torch.float32
        with np.load(path) as file:
            self.about = json.loads(str(file["about"]))
            names = [name for name in file.files if name != "about"]
            arrays = {name: torch.from_numpy(file[name]).to(dtype) for name in names}

        def part(name: str) -> dict[str, Any]:
            return {k[len(name) :]: v for k, v in arrays.items() if k.startswith(name)}

        self.generator = Generator(part("generator/"), self.about["blocks"])
        self.names = sorted(part("victim/"))
        self.victim = ResNet(self.names)
        self.weights = [self._turned(arrays[f"victim/{name}"]) for name in self.names]
        self.target = [self._turned(arrays[f"update/{name}"]) for name in self.names]
        self.target_square: Any = sum(t.square().sum() for t in self.target)
        self.styles = arrays["styles"]
        self.noise = {k: v.permute(0, 3, 1, 2).contiguous() for k, v in part("noise/").items()}
        self.labels = torch.tensor(self.about["labels"])
        mean, std = (torch.tensor(self.about[key], dtype=dtype) for key in ("mean", "std"))
        self.mean, self.std = mean[None, :, None, None], std[None, :, None, None]
        self.compiled: dict[int, Any] | None = {} if options.get("mode") == "compile" else None

    @staticmethod
    def _turned(array: Any) -> Any:
        if array.ndim == 4:
            return array.permute(3, 2, 0, 1).contiguous()
        return array.T.contiguous() if array.ndim == 2 else array

    # ---- the objective

    def render(self, stage: int, point: dict[str, Any], fixed: dict[str, Any]) -> Any:
        """Normalized images."""
        styles = point["styles"]
        noise = {**fixed["noise"], **{k[6:]: v for k, v in point.items() if k[:6] == "noise/"}}
        state = None if stage == 0 else (point["features"], fixed["image"])
        _, image = self.generator.run(styles, noise, state, stage, self.generator.blocks)
        return ((image + 1) / 2 - self.mean) / self.std

    def loss(self, weights: list[Any], x: Any) -> Any:
        """Of the victim."""
        return F.cross_entropy(self.victim.logits(weights, x), self.labels)

    def terms(self, gradients: Any, x: Any) -> Any:
        """Cosine distance, total variation, length."""
        product: Any = sum((g * t).sum() for g, t in zip(gradients, self.target, strict=True))
        own: Any = sum(g.square().sum() for g in gradients)
        value = 1 - product / (own.sqrt() * self.target_square.sqrt())
        down = (x[:, :, 1:] - x[:, :, :-1]).abs().mean()
        right = (x[..., 1:] - x[..., :-1]).abs().mean()
        value = value + self.about["total_variation"] * (down + right)
        length = x.square().sum().sqrt() / (x.shape[2] * x.shape[3])
        return value + self.about["image_l2"] * length

    def eager(self, stage: int, point: dict[str, Any], fixed: dict[str, Any]) -> tuple[Any, Any]:
        """(loss, derivatives), reverse over reverse."""
        leaves = {name: value.detach().requires_grad_(True) for name, value in point.items()}
        weights = [w.detach().requires_grad_(True) for w in self.weights]
        x = self.render(stage, leaves, fixed)
        inner = torch.autograd.grad(self.loss(weights, x), weights, create_graph=True)
        value = self.terms(inner, x)
        found = torch.autograd.grad(value, list(leaves.values()))
        return value.detach(), dict(zip(leaves, found, strict=True))

    def functional(
        self, stage: int, point: dict[str, Any], fixed: dict[str, Any]
    ) -> tuple[Any, Any]:
        """The same through ``torch.func``, which ``torch.compile`` can take whole."""

        def objective(point: dict[str, Any]) -> Any:
            x = self.render(stage, point, fixed)
            return self.terms(torch.func.grad(self.loss)(self.weights, x), x)

        slope, value = torch.func.grad_and_value(objective)(point)
        return value, slope

    # ---- the loop

    def step(
        self,
        stage: int,
        state: tuple[dict[str, Any], dict[str, Any], dict[str, Any]],
        fixed: dict[str, Any],
        scalars: Any,
        radii: dict[str, float],
        derive: Any,
    ) -> tuple[Any, Any]:
        """One step of Adam and the projection; ``scalars`` are rate and both bias corrections."""
        point, first, second = state
        value, slope = derive(stage, point, fixed)
        rate, correct_first, correct_second = scalars
        moved, moments, squares = {}, {}, {}
        for name, g in slope.items():
            moments[name] = 0.9 * first[name] + 0.1 * g
            squares[name] = 0.999 * second[name] + 0.001 * g * g
            deviation = (squares[name] / correct_second).sqrt() + 1e-8
            new = point[name] - rate * (moments[name] / correct_first) / deviation
            if name in radii:
                start = fixed["start"][name]
                new = start + project(new - start, radii[name])
            moved[name] = new
        return value, (moved, moments, squares)

    def search(self, losses: bool) -> dict[str, Any]:
        """All stages; times are of the whole search."""
        cpu, begin = time.process_time(), time.perf_counter()
        styles, noise, state = self.styles, dict(self.noise), None
        kept: list[Any] = []
        for stage, radii in enumerate(self.about["radii"]):
            point: dict[str, Any] = {"styles": styles}
            if state is not None:
                point["features"] = state[0]
            largest, smallest = self.about["noise_up_to"][stage], 4 << stage
            free = [n for n in noise if smallest <= int(n[:-1]) <= largest]
            point |= {f"noise/{name}": noise[name] for name in free}
            fixed = {
                "noise": {name: noise[name] for name in noise if name not in free},
                "image": None if state is None else state[1],
                "start": dict(point),
            }
            kinds = {"features": radii[0], "styles": radii[1]}
            balls = {n: kinds.get(n, radii[2]) * v[0].numel() for n, v in point.items()}
            balls = {name: radius for name, radius in balls.items() if math.isfinite(radius)}
            point = self._stage(stage, point, fixed, balls, kept)
            styles = point["styles"]
            noise |= {name: point[f"noise/{name}"] for name in free}
            with torch.no_grad():
                into = None if state is None else (point["features"], state[1])
                state = self.generator.run(styles, noise, into, stage, stage + 1)
        found = [float(value) for value in kept]
        reply: dict[str, Any] = {"seconds": time.perf_counter() - begin}
        reply |= {"cpu_s": time.process_time() - cpu}
        return reply | ({"losses": found} if losses else {})

    def _stage(
        self,
        stage: int,
        point: dict[str, Any],
        fixed: dict[str, Any],
        balls: dict[str, float],
        kept: list[Any],
    ) -> dict[str, Any]:
        zeros = {name: torch.zeros_like(value) for name, value in point.items()}
        state = (point, zeros, dict(zeros))
        for i, rate in enumerate(self.about["rates"], start=1):
            scalars = torch.tensor([rate, 1 - 0.9**i, 1 - 0.999**i], dtype=self.styles.dtype)
            if self.compiled is None:
                value, slope = self.eager(stage, state[0], fixed)
                derived = lambda *_, found=(value, slope): found  # noqa: E731
                with torch.no_grad():
                    value, state = self.step(stage, state, fixed, scalars, balls, derived)
            else:
                run = self.compiled.get(stage)
                if run is None:
                    run = self.compiled[stage] = torch.compile(self._whole(stage, balls))
                with torch.no_grad():
                    value, state = run(state, fixed, scalars)
            kept.append(value)
        return state[0]

    def _whole(self, stage: int, balls: dict[str, float]) -> Any:
        def run(state: Any, fixed: Any, scalars: Any) -> Any:
            return self.step(stage, state, fixed, scalars, balls, self.functional)

        return run


def main() -> None:
    """Serve commands until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    case: Case | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["do"] == "load":
                case = Case(command["path"], command)
                versions = {n: importlib.metadata.version(n) for n in ("torch", "numpy")}
                reply: dict[str, Any] = {"versions": versions}
            elif case is None:
                raise ValueError("nothing is loaded.")
            else:
                reply = case.search(bool(command.get("losses")))
            reply["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        except Exception as error:
            text = f"{type(error).__name__}: {error}".strip()
            reply = {"failed": text.splitlines()[0][:300]}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
