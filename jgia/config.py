"""Every option of the library as frozen data. No jax here: the command line is made from these."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

from jgia import _checks

FrontEnd = Literal["random", "signed", "direct"]
ModelName = Literal["cnn", "mlp", "lenet", "convnet"]
AttackName = Literal["ares"]
Protocol = Literal["fedsgd", "fedavg"]
Optimizer = Literal["sgd", "momentum", "adam"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AresOptions:
    """What changes the answer of the ARES attack."""

    front_end: FrontEnd = "random"
    """First convolution: `random` unit-norm Gaussian filters (the paper), `signed` +/- identity
    pairs (an upper bound on what leaks), `direct` plain identity (what earlier attacks did;
    fails on normalized inputs)."""

    front_end_trials: int = 32
    """Random draws of the filters; the one that determines the public calibration images best
    is kept. 1 is the paper's single draw."""

    head_gain: float = 1.0
    """Scale of the head's weights: larger gradients survive absolute noise, smaller ones freeze
    the thresholds during local training."""

    spread_widening: float = 1.15
    """Factor on the fitted standard deviation of the query feature, since private data may
    spread wider than the public calibration data."""

    mixture_residual: float = 1e-3
    """A candidate whose relative least-squares residual exceeds this (or its own read-out
    noise, if larger) is a mixture of several samples."""

    lam_ratio: float = 1e-5
    """Last l1 weight of the sparse recovery, relative to the weight at which the solution is
    zero."""

    def __post_init__(self) -> None:
        _checks.one_of(("random", "signed", "direct"), front_end=self.front_end)
        _checks.at_least(1, front_end_trials=self.front_end_trials)
        _checks.positive(
            head_gain=self.head_gain,
            spread_widening=self.spread_widening,
            mixture_residual=self.mixture_residual,
        )
        _checks.fraction(lam_ratio=self.lam_ratio)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerformanceFlags:
    """What changes only time and memory. Answers agree to rounding."""

    microbatch: int | None = None
    """Candidates inverted at once; chosen from the image size and the device when left out."""

    dtype: Literal["float32", "float64"] = "float32"
    """Arithmetic of the inversion. `float64` needs JAX_ENABLE_X64=1."""

    def __post_init__(self) -> None:
        if self.microbatch is not None:
            _checks.at_least(1, microbatch=self.microbatch)
        _checks.one_of(("float32", "float64"), dtype=self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The victim model. No attack changes it; only parameter values are chosen."""

    model: ModelName = "cnn"
    """`cnn` (convolutions, one wide fully connected layer, head: what ARES attacks), `mlp`,
    `lenet` (Deep Leakage from Gradients), `convnet` (group normalization, pooling)."""

    widths: tuple[int, ...] | None = None
    """Convolution channels (cnn, convnet, lenet) or hidden widths (mlp); default of the model."""

    fc_width: int = 1024
    """Neurons of the cnn's fully connected layer: the number of bins."""

    def __post_init__(self) -> None:
        _checks.one_of(("cnn", "mlp", "lenet", "convnet"), model=self.model)
        _checks.at_least(1, fc_width=self.fc_width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from, and which of them are the client's."""

    data: str = "sample"
    """`sample`, `tfds:NAME[:split]`, `npz:PATH` or `folder:PATH`."""

    image_size: int | None = None
    """Side in pixels to resize to (`sample` has 32 and 64); as they are when left out."""

    limit: int | None = None
    """Load at most this many images."""

    download: bool = False
    """Let tensorflow-datasets download a data set that is not on disk."""

    data_dir: str | None = None
    """Folder of tensorflow-datasets' data sets."""

    calibration: str = "holdout"
    """Public images the server calibrates on: `holdout` (the same data set, never the client's
    images) or any data specification."""

    num_public: int = 1024
    """How many public images at most."""

    normalize: bool = True
    """Normalize inputs by the public images' channel means and deviations; raw pixels if not."""

    def __post_init__(self) -> None:
        _checks.at_least(1, num_public=self.num_public)
        for name in ("image_size", "limit"):
            if (value := getattr(self, name)) is not None:
                _checks.at_least(1, **{name: value})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """How a client turns its examples into an update."""

    protocol: Protocol = "fedsgd"
    """`fedsgd` shares the gradient of the mean loss over all examples; `fedavg` trains locally
    and shares the parameters' change."""

    local_epochs: int = 1
    """Passes over the examples (FedAvg only)."""

    local_batch_size: int | None = None
    """Examples per local step (FedAvg only); all of them when left out. A shorter last minibatch
    is kept: it is one step on the mean loss of its own examples."""

    optimizer: Optimizer = "sgd"
    """`sgd`, `momentum` (heavy ball) or `adam` (optax's defaults), starting from an empty state
    in every round."""

    learning_rate: float = 0.1
    """Step size of the local optimizer. FedSGD does not use it."""

    momentum: float = 0.9
    """Decay of the `momentum` optimizer, in (0, 1)."""

    shuffle: bool = True
    """Draw a new order of the examples for every epoch, from the key alone."""

    def __post_init__(self) -> None:
        _checks.one_of(("fedsgd", "fedavg"), protocol=self.protocol)
        _checks.one_of(("sgd", "momentum", "adam"), optimizer=self.optimizer)
        _checks.at_least(1, local_epochs=self.local_epochs)
        _checks.positive(learning_rate=self.learning_rate)
        _checks.fraction(momentum=self.momentum)
        if self.local_batch_size is not None:
            _checks.at_least(1, local_batch_size=self.local_batch_size)
        if self.protocol == "fedsgd" and (self.local_epochs, self.local_batch_size) != (1, None):
            raise ValueError(
                "protocol='fedsgd' shares one gradient of the whole batch, got "
                f"local_epochs={self.local_epochs}, local_batch_size={self.local_batch_size}; "
                "use protocol='fedavg' for local training."
            )

    def num_steps(self, num_examples: int) -> int:
        """Optimizer steps that a client with ``num_examples`` examples makes in one round.

        >>> ClientConfig(protocol="fedavg", local_epochs=2, local_batch_size=8).num_steps(20)
        6
        """
        size = num_examples if self.local_batch_size is None else self.local_batch_size
        return self.local_epochs * math.ceil(num_examples / min(size, num_examples))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """One audit: whose data, which model, which round, which attack."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    client: ClientConfig = dataclasses.field(default_factory=ClientConfig)
    ares: AresOptions = dataclasses.field(default_factory=AresOptions)
    performance: PerformanceFlags = dataclasses.field(default_factory=PerformanceFlags)

    attack: AttackName = "ares"
    """The attack to run."""

    batch: int = 32
    """Images the client holds."""

    seed: int = 0
    """Decides everything random: split, filters, order, probe."""

    lpips: bool = False
    """Also score LPIPS (needs the `lpips` extra)."""

    def __post_init__(self) -> None:
        _checks.one_of(("ares",), attack=self.attack)
        _checks.at_least(1, batch=self.batch)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2^32 - 1, got {self.seed}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CraftConfig:
    """Parameters that a malicious server would send, written to a file."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    ares: AresOptions = dataclasses.field(default_factory=AresOptions)

    seed: int = 0
    """Decides filters, query and head."""

    out: Path = Path("jgia-crafted")
    """Folder for `params.npz` (or .safetensors) and `victim.json`."""

    format: Literal["npz", "safetensors"] = "npz"
    """File format of the parameters."""

    layout: Literal["flax", "torch"] = "flax"
    """Names and axes: `flax` (conv1/kernel, HWIO) or `torch` (conv1.weight, OIHW)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """An update that was computed elsewhere on crafted parameters."""

    crafted: Path
    """Folder written by `jgia craft`."""

    update: Path
    """The client's update: .npz or .safetensors with the names of the parameters."""

    layout: Literal["flax", "torch"] = "flax"
    """Names and axes of the update."""

    protocol: Protocol = "fedsgd"
    """Whether the update is a gradient or a parameter difference; ARES reads both alike."""

    truth: str | None = None
    """Data specification of the client's images, if they are known, to score against."""

    ares: AresOptions = dataclasses.field(default_factory=AresOptions)
    performance: PerformanceFlags = dataclasses.field(default_factory=PerformanceFlags)

    seed: int = 0
    """Decides the rank probe."""

    out: Path = Path("jgia-report")
    """Folder for the report."""

    json: bool = False
    """Print result.json instead of the table."""
