"""Deprecated: `hf_adalip.recipe.image.loop` has what was here."""

from .deprecated import moved
from .recipe.image.loop import Progress, Training

__all__ = ["Progress", "Training"]

moved(__name__, "hf_adalip.recipe.image.loop")
