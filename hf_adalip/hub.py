"""Deprecated: `hf_adalip.publish` has what was here."""

import warnings

from .publish import PublishError, left_out, prepare, publish

__all__ = ["PublishError", "left_out", "prepare", "publish"]

warnings.warn(
    "hf_adalip.hub is deprecated: import from hf_adalip.publish", DeprecationWarning, stacklevel=2
)
