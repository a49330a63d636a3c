"""breaching in a process of its own: one JSON command a line in, one JSON answer a line out.

Runs under the peer's interpreter (``--peer-python`` of ``gradient_matching.py``) and imports
nothing of jgia: models, weights, images and starting points come from files.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

warnings.filterwarnings("ignore")

_ACTIVATIONS = {
    "relu": torch.nn.ReLU,
    "sigmoid": torch.nn.Sigmoid,
    "leaky_relu": lambda: torch.nn.LeakyReLU(0.2),
}
_POOLS = {"average": torch.nn.AvgPool2d, "max": torch.nn.MaxPool2d}


class Residual(torch.nn.Module):
    """``activation(branch(x) + shortcut(x))``."""

    def __init__(self, branch: Any, shortcut: Any, activation: Any) -> None:
        super().__init__()
        self.branch, self.shortcut, self.activation = branch, shortcut, activation

    def forward(self, x: Any) -> Any:
        """Images to images."""
        return self.activation(self.branch(x) + self.shortcut(x))


class GlobalAverage(torch.nn.Module):
    """Mean over the image."""

    def forward(self, x: Any) -> Any:
        """(B, C, H, W) to (B, C, 1, 1)."""
        return x.mean(dim=(2, 3), keepdim=True)


class Builder:
    """Modules of a described model, and which named weights belong to them."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.names: dict[int, str] = {}
        self.flat = False

    def sequence(self, layers: list[dict[str, Any]]) -> Any:
        """All layers, one after the other."""
        return torch.nn.Sequential(*(part for layer in layers for part in self.parts(layer)))

    def parts(self, layer: dict[str, Any]) -> Iterator[Any]:
        """The modules of one layer."""
        kind = layer["kind"]
        if kind == "activation":
            yield _ACTIVATIONS[layer["name"]]()
        elif kind == "pool":
            if layer["name"] == "global_average":
                yield GlobalAverage()
            else:
                sizes = layer["window"], layer["stride"], layer["padding"]
                yield _POOLS[layer["name"]](*sizes)
        elif kind == "residual":
            shortcut = self.sequence(layer["shortcut"])
            end = _ACTIVATIONS[layer["activation"]]()
            yield Residual(self.sequence(layer["branch"]), shortcut, end)
        else:
            if kind == "dense" and not self.flat:
                self.flat = True
                yield torch.nn.Flatten()
            yield self.named(layer)

    def named(self, layer: dict[str, Any]) -> Any:
        """A module with weights."""
        name = layer["name"]
        kernel, bias = f"param/{name}/kernel", f"param/{name}/bias" in self.arrays
        if layer["kind"] == "conv":
            outputs, inputs, *size = self.arrays[kernel].shape
            module = torch.nn.Conv2d(
                inputs, outputs, tuple(size), layer["stride"], layer["padding"], bias=bias
            )
        elif layer["kind"] == "dense":
            outputs, inputs = self.arrays[kernel].shape
            module = torch.nn.Linear(inputs, outputs, bias=bias)
        else:
            channels = len(self.arrays[f"param/{name}/scale"])
            if layer["kind"] == "group_norm":
                module = torch.nn.GroupNorm(layer["groups"], channels)
            else:
                module = torch.nn.BatchNorm2d(channels)
        self.register(module, name)
        return module

    def register(self, module: Any, name: str) -> None:
        """Remember whose the weights are, and load them."""
        scale = isinstance(module, (torch.nn.BatchNorm2d, torch.nn.GroupNorm))
        self.load(module.weight, f"{name}/{'scale' if scale else 'kernel'}")
        if module.bias is not None:
            self.load(module.bias, f"{name}/bias")
        if isinstance(module, torch.nn.BatchNorm2d):
            for buffer, key in ((module.running_mean, "mean"), (module.running_var, "var")):
                if f"{key}/{name}" in self.arrays:
                    buffer.copy_(torch.from_numpy(self.arrays[f"{key}/{name}"]))

    def load(self, parameter: Any, name: str) -> None:
        """One array."""
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(self.arrays[f"param/{name}"]))
        self.names[id(parameter)] = name


def torchvision_resnet18(builder: Builder, num_classes: int) -> Any:
    """ResNet-18 of torchvision with the stem for small images, and our weights."""
    import torchvision

    model = torchvision.models.resnet18(num_classes=num_classes)
    model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = torch.nn.Identity()
    builder.register(model.conv1, "conv1")
    builder.register(model.bn1, "norm1")
    blocks = [block for i in range(1, 5) for block in getattr(model, f"layer{i}")]
    for i, block in enumerate(blocks, start=1):
        pairs = {"conv1": block.conv1, "norm1": block.bn1, "conv2": block.conv2, "norm2": block.bn2}
        if block.downsample is not None:
            pairs |= {"shortcut": block.downsample[0], "shortcut_norm": block.downsample[1]}
        for name, module in pairs.items():
            builder.register(module, f"block{i}/{name}")
    builder.register(model.fc, "head")
    return model


class Case:
    """One exported problem, and breaching's attack on it."""

    def __init__(self, path: str, options: dict[str, Any]) -> None:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop("about")))
        self.dtype = torch.float64 if options.get("dtype") == "float64" else torch.float32
        builder = Builder(arrays)
        if about["model"] == "resnet18":
            self.model = torchvision_resnet18(builder, about["num_classes"])
        else:
            self.model = builder.sequence(about["layers"])
        names = [builder.names[id(parameter)] for parameter in self.model.parameters()]
        self.model.eval().to(self.dtype)
        self.labels = torch.from_numpy(arrays["labels"].astype(np.int64))
        self.images = self.tensor(arrays["inputs"])
        self.start = self.tensor(arrays["start"])
        self.gradients = [torch.from_numpy(arrays[f"update/{n}"]).to(self.dtype) for n in names]
        self.about, self.loss = about, torch.nn.CrossEntropyLoss()
        if options.get("mode") == "compile":
            self.model = torch.compile(self.model)
        self.mode = "trace" if options.get("mode") == "trace" else None

    def tensor(self, images: np.ndarray) -> Any:
        """NHWC to NCHW."""
        turned = np.ascontiguousarray(np.moveaxis(images, -1, -3))
        return torch.from_numpy(turned).to(self.dtype)

    def gradient_error(self) -> float:
        """Relative difference between the exported update and torch's own gradient."""
        parameters = list(self.model.parameters())
        own = torch.autograd.grad(self.loss(self.model(self.images), self.labels), parameters)
        pairs = list(zip(own, self.gradients, strict=True))
        away = sum(float((a - b).pow(2).sum()) for a, b in pairs)
        return float(np.sqrt(away / sum(float(b.pow(2).sum()) for _, b in pairs)))

    def reconstruct(self, steps: int, restarts: int, *, tv: float, given: bool) -> Any:
        """The attack as breaching's own examples call it: (images NCHW, its record)."""
        import breaching

        about = self.about
        overrides = [f"optim.max_iterations={steps}", "optim.callback=1000000"]
        overrides += [
            f"restarts.num_trials={restarts}",
            f"regularization.total_variation.scale={tv}",
        ]
        overrides += ["impl.dtype=double"] if self.dtype == torch.float64 else []
        overrides += [f"impl.JIT={self.mode}"] if self.mode else []
        config = breaching.get_attack_config("invertinggradients", overrides=overrides)
        setup = {"device": torch.device("cpu"), "dtype": self.dtype}
        attacker = breaching.attacks.prepare_attack(self.model, self.loss, config, setup)

        class Metadata:
            modality, classes = "vision", about["num_classes"]
            shape = tuple(self.images.shape[1:])
            mean, std = about["mean"], about["std"]

        payload = {
            "parameters": list(self.model.parameters()),
            "buffers": list(self.model.buffers()),
            "metadata": Metadata,
        }
        shared = {
            "gradients": list(self.gradients),
            "buffers": None,
            "metadata": {
                "num_data_points": len(self.labels),
                "labels": self.labels,
                "local_hyperparams": None,
            },
        }
        torch.manual_seed(0)
        start = self.start if given else None
        found, stats = attacker.reconstruct([payload], [shared], {}, initial_data=start)
        return found["data"], stats

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Run one search; times are of the whole call."""
        cpu, begin = time.process_time(), time.perf_counter()
        images, stats = self.reconstruct(
            command["steps"],
            command.get("restarts", 1),
            tv=command["total_variation"],
            given=bool(command.get("from_file")),
        )
        seconds = time.perf_counter() - begin
        done = {
            "seconds": seconds,
            "cpu_s": time.process_time() - cpu,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        if command.get("losses"):
            done["losses"] = stats["Trial_0_Val"]
        if command.get("images"):
            mean, std = (np.asarray(self.about[key]) for key in ("mean", "std"))
            pixels = np.moveaxis(images.detach().numpy().astype(np.float64), 1, -1) * std + mean
            np.save(command["images"], np.clip(pixels, 0, 1))
        return done


def versions() -> dict[str, str]:
    """Of what the peer runs on."""
    names = ("breaching", "torch", "torchvision", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def main() -> None:
    """Serve commands until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the peer prints is no answer
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    case: Case | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["do"] == "load":
                case = Case(command["path"], command)
                error = None if command.get("mode") else case.gradient_error()
                answer = {"gradient_error": error, "versions": versions()}
            elif case is None:
                raise ValueError("nothing is loaded.")
            else:
                answer = case.answer(command)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".strip()
            answer = {"failed": text.splitlines()[0][:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
