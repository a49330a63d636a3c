"""Label inference: which classes a client's examples have, and how many of each."""

from jgia.attacks.labels.calibration import Calibration, calibrate
from jgia.attacks.labels.infer import LabelEstimate, LabelInference, infer_labels

__all__ = ["Calibration", "LabelEstimate", "LabelInference", "calibrate", "infer_labels"]
