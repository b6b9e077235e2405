"""Deprecated: `hf_adalip.recipe.image.training` has what was here."""

from .deprecated import moved
from .recipe.image.training import Recipe, Training, TrainingArguments, main, output_dir, train

__all__ = ["Recipe", "Training", "TrainingArguments", "main", "output_dir", "train"]

moved(__name__, "hf_adalip.recipe.image.training")
