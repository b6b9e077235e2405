"""Deprecated: `hf_adalip.recipe.image.metrics` has what was here."""

from .deprecated import moved
from .recipe.image.metrics import Accuracy

__all__ = ["Accuracy"]

moved(__name__, "hf_adalip.recipe.image.metrics")
