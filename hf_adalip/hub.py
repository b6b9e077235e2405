"""Deprecated: `hf_adalip.publish` has what was here."""

from .deprecated import moved
from .publish import PublishError, left_out, prepare, publish

__all__ = ["PublishError", "left_out", "prepare", "publish"]

moved(__name__, "hf_adalip.publish")
