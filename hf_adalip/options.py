"""Deprecated: `hf_adalip.recipe.image.options` has what was here."""

from .deprecated import moved
from .errors import UsageError
from .recipe.image.options import Recipe, TrainingArguments, optimizer_arguments, option, parse

__all__ = ["Recipe", "TrainingArguments", "UsageError", "optimizer_arguments", "option", "parse"]

moved(__name__, "hf_adalip.recipe.image.options")
