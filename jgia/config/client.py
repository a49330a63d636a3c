"""How a client turns its examples into an update."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jgia import _checks

Protocol = Literal["fedsgd", "fedavg"]
Optimizer = Literal["sgd", "momentum", "adam"]


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

    num_clients: int = 1
    """Clients that share the batch out among them. With more than one the server sees the sum of
    their updates, weighted by their numbers of images (secure aggregation), and no single one."""

    shuffle: bool = True
    """Draw a new order of the examples for every epoch, from the key alone."""

    share_batch_statistics: bool = False
    """Share the means and variances that the client's batch gave its batch normalizations with the
    update (those of the first local step with FedAvg), as clients do whose server keeps running
    statistics. Needs a model with batch normalization."""

    def __post_init__(self) -> None:
        _checks.one_of(("fedsgd", "fedavg"), protocol=self.protocol)
        _checks.one_of(("sgd", "momentum", "adam"), optimizer=self.optimizer)
        _checks.at_least(1, local_epochs=self.local_epochs, num_clients=self.num_clients)
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
        if self.share_batch_statistics and self.num_clients > 1:
            raise ValueError(
                "share_batch_statistics is for one client, got "
                f"num_clients={self.num_clients}: sums of statistics are not simulated; leave one "
                "of them out."
            )

    def num_steps(self, num_examples: int) -> int:
        """Optimizer steps that a client with ``num_examples`` examples makes in one round.

        >>> ClientConfig(protocol="fedavg", local_epochs=2, local_batch_size=8).num_steps(20)
        6
        """
        size = num_examples if self.local_batch_size is None else self.local_batch_size
        return self.local_epochs * math.ceil(num_examples / min(size, num_examples))
