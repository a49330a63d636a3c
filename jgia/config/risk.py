"""What ``jgia risk`` takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from jgia import _checks
from jgia.config.client import ClientConfig
from jgia.config.data import DataConfig
from jgia.config.explain import ExplainConfig
from jgia.config.model import ModelConfig

PriorName = Literal["gaussian", "isotropic", "low_rank"]
RouteName = Literal["auto", "svd", "qr", "rows", "gram", "structured"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RiskConfig:
    """One risk estimate: whose images, which model, what is shared, under how much noise."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=lambda: ModelConfig(model="lenet"))
    client: ClientConfig = dataclasses.field(default_factory=ClientConfig)

    explain: ExplainConfig = dataclasses.field(default_factory=ExplainConfig)

    trained: Path | None = None
    """Parameters of honest training: a folder written by `jgia train-victim`, instead of `--model`
    with random ones; `--batch-norm` may change its mode."""

    images: int = 4
    """Images to estimate."""

    together: int = 1
    """Images behind each update; their number divides `--images`."""

    noise_std: float = 1e-3
    """Standard deviation of the noise on every shared entry, in absolute terms: a defense's, or
    what rounding leaves without one."""

    rounds: int = 1
    """Rounds in which the client releases updates like this one of the same images, each with
    noise of its own: their information adds up."""

    clip_norm: float | None = None
    """The client clips what it shares to this Euclidean norm."""

    prior: PriorName = "gaussian"
    """What the attacker expects of an image, from the public ones: their mean and covariance
    (`gaussian`), their mean variance alone (`isotropic`), or leading principal components
    (`low_rank`, for images of many pixels)."""

    prior_rank: int = 64
    """Components of a low-rank prior."""

    shrinkage: float = 1e-3
    """Share of the identity in a Gaussian prior's covariance."""

    labels_known: bool = True
    """Give the attacker the labels; otherwise they have to be estimated with the images."""

    visible_layers: tuple[str, ...] | None = None
    """Layers whose update it holds; all of them when left out."""

    embedding: str | None = None
    """Share this layer's output instead of an update, as in vertical or split learning."""

    route: RouteName = "auto"
    """How the spectrum is computed: `svd`, `qr` (every digit kept), `rows`, `gram`, `structured`
    (squared: quicker), or by what fits."""

    per_layer: bool = True
    """Also score every layer alone."""

    spectrum: bool | None = None
    """Also singular values; of up to 1,024 pixels when left out."""

    chunk_size: int = 64
    """Directions that are pushed through the model at a time."""

    memory_gib: float = 2.0
    """Memory that the route may take."""

    seed: int = 0
    """Decides the images, random parameters and Monte Carlo draws."""

    out: Path = Path("jgia-risk")
    """Folder for risk.json, risk.npz and figures."""

    json: bool = False
    """Print risk.json instead of the table."""

    def __post_init__(self) -> None:
        _checks.at_least(1, images=self.images, together=self.together, chunk_size=self.chunk_size)
        _checks.at_least(1, rounds=self.rounds)
        _checks.positive(noise_std=self.noise_std, memory_gib=self.memory_gib)
        _checks.fraction(shrinkage=self.shrinkage)
        _checks.one_of(get_args(PriorName), prior=self.prior)
        _checks.one_of(get_args(RouteName), route=self.route)
        if self.images % self.together:
            raise ValueError(
                f"together={self.together} must divide images={self.images}: every update covers "
                "the same number of them."
            )
        if self.embedding is not None and (
            self.clip_norm is not None or self.visible_layers is not None
        ):
            raise ValueError("an embedding has no clip_norm and no visible_layers; leave them out.")
        if self.explain.explain:
            self._check_explain()
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2^32 - 1, got {self.seed}.")

    def _check_explain(self) -> None:
        """What an explanation cannot be combined with."""
        if self.rounds > 1:
            raise ValueError(
                f"--explain is about one release, got rounds={self.rounds}; leave --rounds out "
                "(--noise-rounds sizes the noise of adaptive defenses)."
            )
        if self.prior == "low_rank":
            raise ValueError(
                "--explain needs a prior of full rank, got prior='low_rank'; use --prior gaussian "
                "or isotropic, with a smaller --image-size."
            )
        if not self.labels_known:
            raise ValueError("--explain attacks with known labels; leave --no-labels-known out.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditRiskOptions:
    """The estimate that an audit sets beside its attack."""

    risk_images: int = 0
    """Also estimate, without attacking (`jgia risk`), how well any attack could reconstruct each of
    so many of the client's images, taking the others of its batch for known; 0 for none."""

    risk_noise_std: float = 1e-3
    """Standard deviation of the noise to assume on every shared entry where no defense states
    its own."""

    risk_prior: PriorName = "gaussian"
    """What the attacker is taken to expect of an image, as in `jgia risk`; `low_rank` is quicker
    for images of many pixels."""

    risk_prior_rank: int = 256
    """Components of a low-rank prior; as many as there are public images at most."""

    def __post_init__(self) -> None:
        _checks.at_least(0, risk_images=self.risk_images)
        _checks.at_least(1, risk_prior_rank=self.risk_prior_rank)
        _checks.positive(risk_noise_std=self.risk_noise_std)
        _checks.one_of(get_args(PriorName), risk_prior=self.risk_prior)
