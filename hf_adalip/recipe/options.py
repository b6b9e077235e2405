"""What both kinds of recipes do with options: read them, and check them before a run starts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from ..errors import UsageError
from ..registry import create_optimizer

try:
    import yaml  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError(
        "hf_adalip.recipe.options needs pyyaml: pip install 'hf-adalip[recipes]'"
    ) from error

_HIGHEST_SEED = 2**32 - 1  # that numpy takes


HIGHEST = 2**31 - 1  # of counts, which are multiplied and become torch's and C's integers


class OneLineErrors:
    """Of a parser: it raises UsageError, with what an unknown option may have been meant to be."""

    _option_string_actions: dict[str, Any]  # argparse's, by option

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2]
        name = unknown.split()[0].partition("=")[0] if unknown else ""
        raise UsageError(message + (_near(name, self._option_string_actions) if name else ""))


def _near(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def read_config(path: str, known: Collection[str]) -> dict[str, Any]:
    """What a --config file says, by option.

    Raises:
        UsageError: if the file cannot be read, or has what is not among the known options.
    """
    try:
        found = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read --config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UsageError(f"--config {path} must have lines of `option: value`")
    for key in found:
        if key not in known:
            hint = _near(str(key), known)
            raise UsageError(f"--config {path}: unknown option {key!r}{hint}")
    return found


def check_bounds(args: Any, at_least: Mapping[str, int]) -> None:
    """Raises UsageError for a number that is too small or not finite, or too large for a seed or a
    count."""
    for name, least in at_least.items():
        value = getattr(args, name, None)
        if value is not None and not least <= value < math.inf:
            raise UsageError(f"--{name} must be at least {least}, got {value}")
        most = _HIGHEST_SEED if name.endswith("seed") else HIGHEST
        if isinstance(value, int) and value > most:
            raise UsageError(f"--{name} must be at most {most}, got {value}")


def check_hub_options(push: bool, model_id: str | None, private: bool) -> None:
    """Raises UsageError if one of the options for publishing, of either loop, lacks another."""
    if push and model_id is None:
        raise UsageError("--push_to_hub needs --hub_model_id USER/NAME")
    if not push and (model_id or private):
        raise UsageError("--hub_model_id and --hub_private_repo need --push_to_hub")


def in_optim_args(given: Mapping[str, Any]) -> dict[str, str]:
    """How `check_optimizer` is to call arguments that were in --optim_args."""
    return {name: f"--optim_args {name}={value}" for name, value in given.items()}


def check_optimizer(name: str, arguments: Mapping[str, Any], written: Mapping[str, str]) -> None:
    """Raises UsageError if no such optimizer can be made, with the option whose value is why.

    Args:
        name: of the optimizer.
        arguments: of the optimizer.
        written: of those that the user gave, the option and the value.
    """

    def error_of(some: Mapping[str, Any]) -> Exception | None:
        try:
            create_optimizer(nn.Linear(2, 2, bias=False), name, **some)
        except (ValueError, TypeError) as error:
            return error
        return None

    error = error_of(arguments)
    if error is None:
        return
    reason = str(error)
    for key, text in written.items():
        if error_of({k: v for k, v in arguments.items() if k != key}) is None:
            if " not supported between " in reason:  # a word where a number is compared
                reason = "it must be a number"
            form = " (LOW:HIGH, as in 0.1:10, or none)" if key == "scale_bounds" else ""
            raise UsageError(f"{text}{form}: {reason}") from error
    raise UsageError(reason) from error
