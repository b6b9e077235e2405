"""Deprecated: `hf_adalip.recipe.trainer` has what was here."""

from ..deprecated import moved
from ..recipe.trainer import (
    RecipeArguments,
    check_pretrained,
    exit_status,
    optimizer_kwargs,
    parse,
    run,
)

__all__ = ["RecipeArguments", "check_pretrained", "exit_status", "optimizer_kwargs", "parse", "run"]

moved(__name__, "hf_adalip.recipe.trainer")
