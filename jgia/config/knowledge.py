"""What the attacker is told of a simulated client."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnowledgeConfig:
    """What the attacker is told beside the update, the model and the number of examples."""

    labels_known: bool = False
    """Give the attacker the labels of the client's images, in their order."""

    training_known: bool = True
    """Tell it how a FedAvg client trains: steps, batch size and learning rate."""

    order_known: bool = False
    """Tell it which images each local step of a FedAvg client used."""

    visible_layers: tuple[str, ...] | None = None
    """Layers whose update it holds (`conv1`, `fc`, ...); all of them when left out."""
