"""Publishing a run: what is uploaded (hub.py), its model card, and its script with pins."""

from .hub import PublishError, left_out, prepare, publish

__all__ = ["PublishError", "left_out", "prepare", "publish"]
