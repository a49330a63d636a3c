"""Images to audit with: a bundled sample, files, folders, and TensorFlow Datasets.

:func:`load_dataset` turns one string into a :class:`Dataset`; :func:`split_client_public` divides
it into the client's private images and the attacker's public ones.
"""

from jgia.data.dataset import DataError, Dataset, split_client_public
from jgia.data.load import load_dataset
from jgia.normalization import Normalization

__all__ = [
    "DataError",
    "Dataset",
    "Normalization",
    "load_dataset",
    "split_client_public",
]
