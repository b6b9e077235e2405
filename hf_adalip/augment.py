"""Deprecated: `hf_adalip.recipe.image.augment` has what was here."""

from .deprecated import moved
from .recipe.image.augment import Augmentation, RandomAffine

__all__ = ["Augmentation", "RandomAffine"]

moved(__name__, "hf_adalip.recipe.image.augment")
