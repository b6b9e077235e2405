"""Deprecated: `hf_adalip.diagnose` has what was here."""

import warnings

from .diagnose import Finding, WrongOptimizerError, examine, examine_run

__all__ = ["Finding", "WrongOptimizerError", "examine", "examine_run"]

warnings.warn(
    "hf_adalip.doctor is deprecated: import from hf_adalip.diagnose",
    DeprecationWarning,
    stacklevel=2,
)
