"""Each defense as a transformation of the Jacobian and the noise of a release."""

from jgia.explain.attack import DeclaredChannel, MostProbable, most_probable
from jgia.explain.declared import Declared, check_explained, declare
from jgia.explain.explain import Explanation, explain_defense, predict_defense
from jgia.explain.predict import LARGEST_INPUTS, check_dense, dense_bytes
from jgia.explain.records import explanation_rows
from jgia.explain.words import EFFECTS, Effect

__all__ = [
    "EFFECTS",
    "LARGEST_INPUTS",
    "Declared",
    "DeclaredChannel",
    "Effect",
    "Explanation",
    "MostProbable",
    "check_dense",
    "check_explained",
    "declare",
    "dense_bytes",
    "explain_defense",
    "explanation_rows",
    "most_probable",
    "predict_defense",
]
