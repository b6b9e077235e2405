"""Deprecated: `hf_adalip.recipe.image.engines` has what was here."""

from .deprecated import moved
from .recipe.image.engines import cast_around, check_engine, engine_name, make_accelerator

__all__ = ["cast_around", "check_engine", "engine_name", "make_accelerator"]

moved(__name__, "hf_adalip.recipe.image.engines")
