"""What both kinds of recipes do with options: read them, and check them before a run starts."""

from __future__ import annotations

import argparse
import difflib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from ..errors import UsageError
from ..integrations.arguments import parse_arguments
from ..registry import create_optimizer

try:
    import yaml  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError(
        "hf_adalip.recipe.options needs pyyaml: pip install 'hf-adalip[recipes]'"
    ) from error

AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_train_samples": 1,
    "max_eval_samples": 1,
    "seed": 0,
    "data_seed": 0,
    "weight_decay": 0.0,
}
"""The least values of the options that both kinds of recipes have, or one of them."""

HIGHEST_SEED = 2**32 - 1  # that numpy takes
HIGHEST = 2**31 - 1  # of counts, which are multiplied and become torch's and C's integers


class RecipeParser(argparse.ArgumentParser):
    """A parser with a --config file, whose errors are UsageErrors of one line."""

    structured = False
    """Whether a file may have lists, and mappings as JSON, as options of Trainer's are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})
        self.add_argument("--config", help="YAML file of options, which the command line overrides")

    def error(self, message: str) -> NoReturn:
        """Raises UsageError, with what an unknown option may have been meant to be."""
        unknown = message.partition("unrecognized arguments: ")[2]
        name = unknown.split()[0].partition("=")[0] if unknown else ""
        raise UsageError(message + (_near(name, self._option_string_actions) if name else ""))

    def expand(self, argv: Sequence[str]) -> list[str]:
        """A command line with what its --config file says, before what it says itself, for the
        file: both are read by the same rules.

        Raises:
            UsageError: if the file cannot be read, or has what is no option.
        """
        found, rest = RecipeParser(add_help=False).parse_known_args(argv)
        if not (path := found.config):
            return rest
        known = [action.dest for action in self._actions if action.dest not in ("help", "config")]
        read = _read_config(path, known)
        return [word for key in read for word in self._words(path, key, read[key])] + rest

    def _words(self, path: str, key: str, value: Any) -> list[str]:
        """An option of a file as on a command line; nothing for null."""
        action = self._option_string_actions[f"--{key}"]
        if action.nargs == 0 and not isinstance(value, bool):
            raise UsageError(f"--config {path}: {key} must be true or false, got {value!r}")
        if action.nargs == 0:
            return [f"--{key}" if value else f"--no-{key}"]
        if isinstance(value, list) and self.structured:
            return [f"--{key}", *map(str, value)]
        if isinstance(value, dict) and self.structured:
            value = json.dumps(value)
        if isinstance(value, (list, dict)):
            raise UsageError(f"--config {path}: {key} must be one value, got {value!r}")
        # YAML reads `no` as False
        return [] if value is None else [f"--{key}={'no' if value is False else value}"]


def _read_config(path: str, known: Collection[str]) -> dict[str, Any]:
    try:
        found = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read --config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UsageError(f"--config {path} must have lines of `option: value`")
    for key in found:
        if key not in known:
            raise UsageError(f"--config {path}: unknown option {key!r}{_near(str(key), known)}")
    return found


def _near(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def check_bounds(args: Any, at_least: Mapping[str, float], positive: Collection[str] = ()) -> None:
    """Checks numbers; None is none.

    Args:
        args: the options, as attributes.
        at_least: the least values by option: an integer of a count or a seed, which must not be
            too large either; a float of any number.
        positive: options whose values must be greater than 0.

    Raises:
        UsageError: for a number out of bounds, or one that is not finite.
    """
    for name, least in at_least.items():
        value = getattr(args, name, None)
        if value is not None and not least <= value < math.inf:
            bound = f"at least {least}" if isinstance(least, int) else f"a number from {least:g} on"
            raise UsageError(f"--{name} must be {bound}, got {value}")
        most = HIGHEST_SEED if name.endswith("seed") else HIGHEST
        if isinstance(value, int) and value > most:
            raise UsageError(f"--{name} must be at most {most}, got {value}")
    for name in positive:
        value = getattr(args, name, None)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name} must be a positive number, got {value}")


def check_run_options(args: Any, private: bool) -> None:
    """Raises UsageError if one of the options of a run excludes another, or lacks it.

    Args:
        args: the options, as attributes.
        private: whether only some may have what is published.
    """
    if args.resume_from_checkpoint and args.overwrite_output_dir:
        raise UsageError("--resume_from_checkpoint and --overwrite_output_dir exclude each other")
    if args.push_to_hub and args.hub_model_id is None:
        raise UsageError("--push_to_hub needs --hub_model_id USER/NAME")
    if not args.push_to_hub and (args.hub_model_id or private):
        raise UsageError("--hub_model_id and --hub_private_repo need --push_to_hub")


def parse_optim_args(text: str, own_option: Mapping[str, str]) -> dict[str, Any]:
    """What --optim_args says.

    Args:
        text: its value.
        own_option: of the arguments that have an option of their own, the option.

    Raises:
        ValueError: if it cannot be read, or has one of those.
    """
    given = parse_arguments(text)
    for key in set(given) & set(own_option):
        raise UsageError(f"--optim_args: give {key} as --{own_option[key]}")
    return given


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
