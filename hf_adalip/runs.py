"""Deprecated: `hf_adalip.recipe.run` has what was here."""

from .deprecated import moved
from .recipe.run import asked_to_stop, device_name, load_rates, write_results

__all__ = ["asked_to_stop", "device_name", "load_rates", "write_results"]

moved(__name__, "hf_adalip.recipe.run")
