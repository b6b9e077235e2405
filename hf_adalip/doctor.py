"""Deprecated: `hf_adalip.diagnose` has what was here."""

from .deprecated import moved
from .diagnose import Finding, WrongOptimizerError, examine, examine_run

__all__ = ["Finding", "WrongOptimizerError", "examine", "examine_run"]

moved(__name__, "hf_adalip.diagnose")
