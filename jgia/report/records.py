"""The types of ``result.json``: one ``TypedDict`` per object, with the bounds of its numbers.

These classes are the schema: :func:`jgia.report.schema.validate_result` walks their annotations,
so static types and the check at run time cannot drift apart. Every field is described with its
unit in ``docs/result-schema.md``.

Postponed annotations are not used in this module: ``NotRequired`` must be visible when the classes
are created.
"""

from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict

THRESHOLDS = ("18", "25", "30", "40")
"""PSNR thresholds in dB at which success rates are given, as they are spelled in JSON."""

LEVELS = ("5", "25", "50", "75", "95")
"""Levels in percent at which quantiles are given, as they are spelled in JSON."""

EXACT_PSNR = 200.0
"""PSNR in dB that stands for identical images, whose true value is infinite."""

HEADLINE_DB = 40
"""PSNR in dB of the headline: from here on no difference is visible."""

RECOGNIZABLE_DB = 18
"""PSNR in dB from which ``num_recovered`` counts unless ``recovered_threshold_db`` says else."""


class Bounds(NamedTuple):
    """Inclusive bounds of a number, carried in the annotations below."""

    low: float
    high: float = float("inf")


Number = float | int
"""A JSON number as Python reads it."""

Count = Annotated[int, Bounds(0)]
Positive = Annotated[int, Bounds(1)]
Seconds = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, 1)]
Decibel = float | None
Scalar = str | int | float | bool | None


class Environment(TypedDict):
    """Versions and hardware."""

    jgia: str
    jax: str
    jaxlib: str
    numpy: str
    python: str
    platform: str
    device: str
    threads: Positive | None


class Timings(TypedDict):
    """Wall-clock seconds; compilation apart from running. Further float keys are allowed."""

    setup_s: Seconds
    compile_s: Seconds
    run_s: Seconds
    total_s: Seconds


class Data(TypedDict):
    """The client's and the attacker's images, in words and numbers."""

    name: str
    provenance: str
    num_client: Count
    num_public: Count
    image_shape: list[Positive]
    num_classes: Positive


class ThreatModelRecord(TypedDict):
    """The fields of :class:`jgia.observation.ThreatModel`."""

    server: Literal["malicious", "honest_but_curious"]
    protocol: Literal["fedsgd", "fedavg"]
    local_steps: Positive | None
    local_learning_rate: float | None
    local_epochs: NotRequired[Positive]
    local_batch_size: NotRequired[Positive | None]
    local_optimizer: NotRequired[Literal["sgd", "momentum", "adam"]]
    local_momentum: NotRequired[float]
    order_known: NotRequired[bool]
    num_examples: Positive | None
    labels_known: bool
    public_data: str
    defense: NotRequired[str]
    noise_std: NotRequired[Annotated[float, Bounds(0)]]
    num_clients: NotRequired[Positive]
    visible_layers: NotRequired[list[str] | None]


class Candidate(TypedDict):
    """One thing that the attack looked at. Further keys hold JSON scalars."""

    status: str


class Attack(TypedDict):
    """The attack, its candidates, and what became of them."""

    name: str
    selected_by: str
    expected_recovered: Annotated[float, Bounds(0)] | None
    num_candidates: Count
    candidates: list[Candidate]
    status_counts: dict[str, Count]
    stats: dict[str, Any]


Quantiles = TypedDict(
    "Quantiles", {"5": Decibel, "25": Decibel, "50": Decibel, "75": Decibel, "95": Decibel}
)


class PSNR(TypedDict):
    """Peak signal-to-noise ratios in dB."""

    per_image: list[Decibel]
    median: Decibel
    mean_capped: Decibel
    of_mean_mse: Decibel
    median_all: Decibel
    quantiles: Quantiles


class Similarity(TypedDict):
    """A perceptual metric; ``note`` says why it is undefined, for example for tiny images."""

    per_image: list[float | None]
    median: float | None
    note: NotRequired[str]


class Rate(TypedDict):
    """A proportion with its interval."""

    rate: Share
    low: Share
    high: Share


SuccessRates = TypedDict("SuccessRates", {"18": Rate, "25": Rate, "30": Rate, "40": Rate})


class Baseline(TypedDict):
    """What a guess without the update would score."""

    median: Decibel
    mean_capped: Decibel
    success_rate: NotRequired[SuccessRates]


class Scores(TypedDict):
    """Comparison with the truth, which only the scorer holds."""

    num_true: Positive
    num_reconstructed: Count
    num_recovered: Count
    recovered_threshold_db: NotRequired[float]
    mse: Annotated[float, Bounds(0)] | None
    psnr: PSNR
    ssim: Similarity
    lpips: NotRequired[Similarity]
    label_accuracy: NotRequired[Share]
    success_rate: SuccessRates
    baselines: dict[str, Baseline]
    matching: list[Count | None]


class StageRecord(TypedDict):
    """One stage of a staged search; lists over restarts unless stated otherwise."""

    searched: str
    steps: Count
    seconds: Seconds
    distances: list[float | None]
    curve_steps: list[Positive]
    curve_losses: list[list[float | None]]
    psnr: NotRequired[list[Decibel]]


class StagedSearch(TypedDict):
    """A search of a generator in stages, and why one stage's images were returned."""

    prior: str
    stage: Count
    restart: Count
    why: str
    budget_steps: Positive | None
    budget_seconds: Seconds | None
    stopped_early: bool
    stages: list[StageRecord]


class ImageRisk(TypedDict):
    """How well any attack could reconstruct one image, and how well this one did."""

    risk: Share
    predicted_psnr: Decibel
    invloss: float | None
    information: float | None
    linearization_ratio: float | None
    attack_psnr: Decibel


class LayerRisk(TypedDict):
    """The risk of one layer's update alone, over images."""

    mean: Share
    worst: Share


class SpectrumRecord(TypedDict):
    """Singular values over the noise at a few ranks, means over images."""

    ranks: list[Positive]
    signal_over_noise: list[float]


class Risk(TypedDict):
    """What any attack could get from the update, estimated without one."""

    num_images: Positive
    mean: Share
    worst: Share
    noise_std: Annotated[float, Bounds(0)]
    noise_from: Literal["the defense", "assumed"]
    prior: Literal["gaussian", "isotropic", "low_rank"]
    prior_rank: Positive
    prior_energy: float
    route: str
    left_out: list[str]
    images: list[ImageRisk]
    layers: dict[str, LayerRisk]
    spectrum: SpectrumRecord | None


class Result(TypedDict):
    """The whole of ``result.json``."""

    version: str
    command: str
    config: dict[str, Any]
    environment: Environment
    timings: Timings
    seed: int
    data: Data
    threat_model: ThreatModelRecord
    attack: Attack
    scores: Scores | None
    staged_search: NotRequired[StagedSearch]
    risk: NotRequired[Risk]


EXTRA: dict[Any, Any] = {Timings: Seconds, Candidate: Scalar}
"""What keys beyond the named ones may hold; any JSON value where nothing is said."""
