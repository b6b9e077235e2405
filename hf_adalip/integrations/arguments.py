"""Optimizer arguments as users type them: `gamma=0.9,c=theoretical,scale_bounds=0.1:10`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WORDS = {"true": True, "false": False, "none": None}


def parse_arguments(text: str) -> dict[str, Any]:
    """The arguments in `key=value,key=value`; values as in `convert_arguments`.

    Raises:
        ValueError: for a part that is not `key=value`, or a key that comes twice.
    """
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not key or not equals or not value:
            raise ValueError(f"optimizer arguments are key=value,key=value; got {part!r}")
        if key in found:
            raise ValueError(f"the optimizer argument {key!r} is given twice")
        found[key] = value
    return convert_arguments(found)


def convert_arguments(arguments: Mapping[str, str]) -> dict[str, Any]:
    """Text to values: true, false, none, numbers, `low:high` pairs, and other words as they are.

    `beta1=` and `beta2=`, the form that a comma-separated list allows, become `betas`.

    Raises:
        ValueError: for one of beta1 and beta2 without the other.
    """
    found = {key: _value(text) for key, text in arguments.items()}
    betas = [found.pop(key) for key in ("beta1", "beta2") if key in found]
    if len(betas) == 1:
        raise ValueError("beta1 and beta2 go together; one of them is missing")
    if betas:
        found["betas"] = (betas[0], betas[1])
    return found


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if ":" in text:
        return tuple(_value(part) for part in text.split(":"))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
