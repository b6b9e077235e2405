"""Deprecated: `hf_adalip.recipe.checkpoints` has what was here."""

from .deprecated import moved
from .errors import SaveError, UsageError
from .recipe.checkpoints import (
    check_contents,
    check_distributed,
    find_checkpoint,
    read_checkpoint,
    replacing,
    write_manifest,
)

__all__ = [
    "SaveError",
    "UsageError",
    "check_contents",
    "check_distributed",
    "find_checkpoint",
    "read_checkpoint",
    "replacing",
    "write_manifest",
]

moved(__name__, "hf_adalip.recipe.checkpoints")
