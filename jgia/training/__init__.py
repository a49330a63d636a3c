"""Train a victim for real, and keep it in a folder. ``jgia.train_command`` is the command."""

from jgia.training.checkpoint import CheckpointError
from jgia.training.files import load_victim, save_victim
from jgia.training.measure import Metrics, evaluate
from jgia.training.train import Epoch, TrainedVictim, TrainingError, train_victim

__all__ = [
    "CheckpointError",
    "Epoch",
    "Metrics",
    "TrainedVictim",
    "TrainingError",
    "evaluate",
    "load_victim",
    "save_victim",
    "train_victim",
]
