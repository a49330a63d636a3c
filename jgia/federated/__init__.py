"""The honest client, and the exchange of updates and parameters as files."""

from jgia.federated._errors import UpdateError
from jgia.federated.client import (
    ClientConfig,
    ClientError,
    client_images,
    client_update,
    local_order,
)
from jgia.federated.secure_aggregation import aggregate, simulate_clients
from jgia.federated.torch_layout import from_torch_layout, to_torch_layout
from jgia.federated.updates import load_arrays, load_params, load_update, save_update

__all__ = [
    "ClientConfig",
    "ClientError",
    "UpdateError",
    "aggregate",
    "client_images",
    "client_update",
    "from_torch_layout",
    "load_arrays",
    "load_params",
    "load_update",
    "local_order",
    "save_update",
    "simulate_clients",
    "to_torch_layout",
]
