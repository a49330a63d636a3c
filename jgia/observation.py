"""The nouns everybody shares: threat model, observation, truth, reconstruction, status.

An attack receives an :class:`Observation` and returns a :class:`Reconstruction`. Only the scorer
receives the :class:`Truth`. Nothing in :mod:`jgia.attacks` can import a truth, and a test holds it
to that.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jgia import _checks
from jgia.models import Victim, flatten_params, unflatten_params

PyTree = Any


class Status(enum.StrEnum):
    """What became of one candidate; strings, so that they survive JSON unchanged."""

    EXACT = "exact"
    """Over-determined, solved until the residual reached the read-out's own noise."""
    NOISY = "noisy"
    """Over-determined, but the update's noise leaves a larger residual; mixtures leave more."""
    REGULARIZED = "regularised"
    """Fewer equations than unknowns somewhere: filled in by the sparse prior."""
    RANK_DEFICIENT = "rank_deficient"
    """Enough equations by count, but some pixels are not determined by them."""
    MATCHED = "matched"
    """The best point of a search that matches updates: nothing certifies it, see its loss."""
    NOT_CONVERGED = "not_converged"
    """The solver reached its iteration limit; the image is its best point."""
    MIXTURE = "mixture"
    """Several samples share the bin: the tests of a single sample failed."""
    DUPLICATE = "duplicate"
    """The same image as a candidate with a better score."""
    NONFINITE = "nonfinite"
    """The arithmetic left the finite numbers; the image is blank."""

    @property
    def accepted(self) -> bool:
        """Whether a candidate with this status is returned as a reconstruction."""
        return self in _ACCEPTED


_ACCEPTED = frozenset(
    {
        Status.EXACT,
        Status.NOISY,
        Status.REGULARIZED,
        Status.RANK_DEFICIENT,
        Status.MATCHED,
        Status.NOT_CONVERGED,
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """What the attacker may do and see. Plain data; printed in every report.

    Attributes:
      server: ``"malicious"`` may choose the parameters it sends (never the architecture);
        ``"honest_but_curious"`` sends what training produced and only looks.
      protocol: ``"fedsgd"`` shares one gradient of the mean loss, ``"fedavg"`` the difference
        between the parameters after local training and those sent.
      local_steps: optimizer steps behind a FedAvg update (1 for FedSGD) if the attacker knows
        them, else ``None``.
      local_learning_rate: the client's learning rate if the attacker knows it, else ``None``.
      local_epochs: passes over the examples behind a FedAvg update; ``local_steps`` is a multiple
        of it.
      local_batch_size: examples per local step if the attacker knows it; an equal share of the
        examples is assumed when left out.
      local_optimizer: the client's optimizer: ``"sgd"``, ``"momentum"`` or ``"adam"``.
      local_momentum: decay of the optimizer ``"momentum"``.
      local_order: the rows of the client's examples that each local step used, if the attacker
        knows them, else ``None``. A single pass hides nothing by its order: a batch has none.
      num_examples: how many examples the update covers if the attacker knows it, else ``None``.
      labels: the client's labels, one for each example, if they are given to the attacker, else
        ``None``.
      public_data: what public images the attacker calibrates on, in words.
      defense: what the client does against leakage, in words.
      noise_std: declared standard deviation of the random noise on every shared entry if the
        attacker is told, else 0; also 0 where it has no closed form.
      num_clients: how many clients' updates the observation sums up: 1 without secure
        aggregation.
      visible_layers: the layers whose update the attacker holds; ``None`` for all of them.
    """

    server: Literal["malicious", "honest_but_curious"] = "malicious"
    protocol: Literal["fedsgd", "fedavg"] = "fedsgd"
    local_steps: int | None = 1
    local_learning_rate: float | None = None
    local_epochs: int = 1
    local_batch_size: int | None = None
    local_optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    local_momentum: float = 0.9
    local_order: tuple[tuple[int, ...], ...] | None = None
    num_examples: int | None = None
    labels: tuple[int, ...] | None = None
    public_data: str = "none"
    defense: str = "none"
    noise_std: float = 0.0
    num_clients: int = 1
    visible_layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _checks.one_of(("malicious", "honest_but_curious"), server=self.server)
        _checks.one_of(("fedsgd", "fedavg"), protocol=self.protocol)
        _checks.one_of(("sgd", "momentum", "adam"), local_optimizer=self.local_optimizer)
        _checks.fraction(local_momentum=self.local_momentum)
        _checks.at_least(1, num_clients=self.num_clients, local_epochs=self.local_epochs)
        if self.local_batch_size is not None:
            _checks.at_least(1, local_batch_size=self.local_batch_size)
        if self.local_steps is not None:
            _checks.at_least(1, local_steps=self.local_steps)
            if self.local_steps % self.local_epochs:
                raise ValueError(
                    f"local_steps={self.local_steps} must be a multiple of "
                    f"local_epochs={self.local_epochs}: every pass takes the same number of steps."
                )
        _checks.non_negative(noise_std=self.noise_std)
        if self.local_learning_rate is not None:
            _checks.positive(local_learning_rate=self.local_learning_rate)
        if self.num_examples is not None:
            _checks.at_least(1, num_examples=self.num_examples)
        if (layers := self.visible_layers) is not None and len(set(layers)) < max(1, len(layers)):
            raise ValueError(
                f"visible_layers must name each layer once and at least one, got {layers}; leave "
                "it out where every layer's update is seen."
            )
        if self.protocol == "fedsgd" and self.local_steps != 1:
            raise ValueError(
                f"protocol='fedsgd' shares one gradient, got local_steps={self.local_steps}; "
                "use protocol='fedavg' for several local steps."
            )
        self._check_examples()

    def _check_examples(self) -> None:
        """What is said of single examples fits their number."""
        if self.labels is not None:
            if self.num_examples is not None and len(self.labels) != self.num_examples:
                raise ValueError(
                    f"labels must name one class for each of num_examples={self.num_examples}, "
                    f"got {len(self.labels)}."
                )
            _checks.at_least(0, **{"every label": min(self.labels, default=0)})
        if self.local_order is not None and len(self.local_order) != self.local_steps:
            raise ValueError(
                f"local_order must list the rows of each of local_steps={self.local_steps}, got "
                f"{len(self.local_order)} lists."
            )

    @property
    def labels_known(self) -> bool:
        """Whether labels are given to the attacker."""
        return self.labels is not None

    def record(self) -> dict[str, Any]:
        """The fields as plain data for a report, without anything private: no labels, no rows."""
        fields = dataclasses.asdict(self)
        del fields["labels"], fields["local_order"]
        return fields | {
            "labels_known": self.labels_known,
            "order_known": self.local_order is not None,
        }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """Everything an attacker holds after one round, and nothing else.

    Attributes:
      update: what the client shared: a pytree with the structure of ``params``, less the layers
        that are not visible (:func:`restrict`). A gradient of the mean loss
        (``protocol="fedsgd"``) or ``params_after - params_sent`` (``"fedavg"``).
      params: the parameters that the server sent.
      victim: the model: architecture, input shape, normalization.
      threat_model: what the attacker may do and know.
      batch_statistics: ``{"norm1": (means, variances), ...}`` of the client's batch, where it
        shares those of its batch normalizations with the update, else ``None``.
    """

    update: PyTree
    params: PyTree
    victim: Victim = dataclasses.field(metadata={"static": True})
    threat_model: ThreatModel = dataclasses.field(
        default_factory=ThreatModel, metadata={"static": True}
    )
    batch_statistics: PyTree | None = None

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, np.ndarray],
        *,
        victim: Victim,
        params: PyTree,
        threat_model: ThreatModel | None = None,
    ) -> Observation:
        """Check a flat mapping of arrays against the model and wrap it.

        Use this for an update that was computed elsewhere: names, shapes, dtype and finiteness
        are compared with the model before anything runs.

        Args:
          arrays: ``{"conv1/kernel": ..., "fc/bias": ...}`` in this library's names and layout
            (:func:`jgia.federated.from_torch_layout` converts a PyTorch state dict).
          victim: the model that the update belongs to.
          params: the parameters that the server sent (same structure as the update).
          threat_model: defaults to a malicious FedSGD server. Exactly the arrays of its
            ``visible_layers`` are expected.

        Returns:
          An observation whose ``update`` is a pytree of float arrays.

        Raises:
          ValueError: an array is missing, extra, mis-shaped, not floating point, or not finite,
            or ``params`` do not have the model's names and shapes; the message names the array
            and says what was expected.
        """
        check_params(params, victim)
        threat = threat_model or ThreatModel()
        return cls(
            update=checked_tree(arrays, victim, layers=threat.visible_layers),
            params=params,
            victim=victim,
            threat_model=threat,
        )

    def layer(self, name: str) -> PyTree:
        """The update of one layer: ``{"kernel": ..., "bias": ...}``.

        Raises:
          ValueError: the model has no such layer, or its update is not visible.
        """
        if name in self.update:
            return self.update[name]
        _check_layers((name,), self.params)
        raise ValueError(
            f"the update of layer {name!r} is not visible to this attacker, who holds "
            f"{', '.join(sorted(self.update))}; the attack cannot do without it."
        )


def restrict(observation: Observation, layers: Sequence[str]) -> Observation:
    """What an attacker holds who sees the update of some layers only.

    Clients share part of a model when the rest is frozen, personal or encrypted. The other
    layers' updates are dropped, not zeroed: a zero is an observation, too. The parameters were
    sent by the server and stay known.

    Args:
      observation: of all layers, or restricted before to more than these.
      layers: names as in ``observation.params`` (``"conv1"``, ``"fc"``), in any order.

    Returns:
      An observation whose update has these layers only; its threat model says so.

    Raises:
      ValueError: no layer, one that the model does not have, or one dropped before.
    """
    names = tuple(sorted(set(layers)))
    _check_layers(names, observation.params)
    update = {name: observation.layer(name) for name in names}
    visible = None if set(names) == set(observation.params) else names
    threat = dataclasses.replace(observation.threat_model, visible_layers=visible)
    return dataclasses.replace(observation, update=update, threat_model=threat)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Truth:
    """The client's private examples. Goes to the scorer and nowhere else.

    Attributes:
      images: (N, H, W, C) pixels in [0, 1], in the order in which the client held them.
      labels: (N,) integer class labels.
    """

    images: Any
    labels: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """How an iterative attack went, from its own point of view.

    Attributes:
      steps: (T,) step numbers, from 1.
      losses: (T,) the attack's loss at these steps.
      frame_steps: (F,) steps at which images were kept.
      frames: (F, J, H, W, C) pixels in [0, 1], in the order of the reconstruction's images.
    """

    steps: Any
    losses: Any
    frame_steps: Any
    frames: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What an attack returns. Row i of every array belongs to the same image, best score first.

    A host-side record, not a pytree: statuses are words. Solvers inside ``jit`` return arrays.

    Attributes:
      images: (J, H, W, C) pixels clipped to [0, 1]; accepted candidates only.
      scores: (J,) the attack's own confidence, higher is better; never computed from the truth.
      statuses: one :class:`Status` per returned image.
      selected_by: the rule that ordered and accepted the candidates, in words.
      labels: (J,) class of each image, where the attack inferred or was given them.
      history: how a search went, for those that iterate.
      candidates: one plain mapping per candidate that was looked at, accepted or not, with at
        least ``status``; JSON-ready.
      stats: solver and read-out numbers, JSON-ready.
    """

    images: Any
    scores: Any
    statuses: tuple[Status, ...]
    selected_by: str
    candidates: tuple[Mapping[str, Any], ...] = ()
    stats: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    labels: Any = None
    history: History | None = None


def checked_tree(
    arrays: Mapping[str, np.ndarray], victim: Victim, *, layers: Sequence[str] | None = None
) -> PyTree:
    """A flat mapping of arrays as a pytree, once names, shapes, dtypes and values fit the model.

    Args:
      arrays: ``{"conv1/kernel": ...}``.
      victim: the model.
      layers: the layers that are expected; all of the model's when left out.

    Raises:
      ValueError: as :meth:`Observation.from_arrays`.
    """
    shapes = victim.param_shapes()
    if layers is not None:
        _check_layers(layers, shapes)
        shapes = {name: shapes[name] for name in layers}
    expected = flatten_params(shapes)
    _match_names(arrays, expected, "the update does not")
    return unflatten_params(
        {
            name: check_array(name, arrays[name], tuple(leaf.shape))
            for name, leaf in expected.items()
        }
    )


def check_params(params: PyTree, victim: Victim) -> None:
    """Compare the names and shapes of parameters with the model's; values are not looked at.

    Raises:
      ValueError: a parameter is missing, extra or mis-shaped.
    """
    expected = flatten_params(victim.param_shapes())
    given = flatten_params(params)
    _match_names(given, expected, "the parameters do not")
    for name, leaf in expected.items():
        _check_shape(f"parameter {name}", np.shape(given[name]), tuple(leaf.shape))


def _check_layers(layers: Sequence[str], known: Mapping[str, Any]) -> None:
    unknown = sorted(set(layers) - set(known))
    if unknown or not layers:
        shown = ", ".join(ascii(name[:60]) for name in unknown[:5]) or "none"
        raise ValueError(
            f"expected one or more of the layers {', '.join(sorted(known))}; got {shown}."
        )


def _match_names(arrays: Mapping[str, Any], expected: Mapping[str, Any], subject: str) -> None:
    missing = sorted(set(expected) - set(arrays))
    extra = sorted(set(arrays) - set(expected))
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"missing {', '.join(missing)}")
        if extra:  # may come from a file: escape, shorten, and list a few
            shown = ", ".join(ascii(name[:60]) for name in extra[:5])
            more = f" and {len(extra) - 5} more" if len(extra) > 5 else ""
            parts.append(f"not in the model: {shown}{more}")
        raise ValueError(
            f"{subject} fit the model ({'; '.join(parts)}). Expected exactly "
            f"{', '.join(sorted(expected))}; was it computed with another model?"
        )


def _check_shape(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        hint = ""
        if sorted(got) == sorted(expected):
            hint = " The axes look permuted: convert with from_torch_layout (--layout torch)."
        raise ValueError(f"{name} must have shape {expected}, got {got}.{hint}")


def check_array(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One array of an update: float32 or float64, of ``shape``, finite; else ``ValueError``."""
    array = np.asarray(value)
    if array.dtype not in (np.float32, np.float64):
        raise ValueError(
            f"{name} must be float32 or float64, got {array.dtype}: the read-out takes "
            "differences that half precision and integers cannot hold; export the update in "
            "float32."
        )
    _check_shape(name, array.shape, shape)
    if not np.all(np.isfinite(array)):
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        raise ValueError(
            f"{name} has {bad} NaN or infinite entries of {array.size}; the update is unusable. "
            "Check the client's training (learning rate, mixed precision) and export it again."
        )
    return array
