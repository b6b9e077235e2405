"""`hf-adalip optimizers`: the names of the registry."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..registry import list_optimizers


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command and its options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "optimizers", help="list the optimizers by name"
    )
    parser.add_argument("filter", nargs="?", default="*", help="a wildcard, as in 'ada*'")
    return parser


def run(args: argparse.Namespace) -> None:
    """Lists the optimizers."""
    found = list_optimizers(args.filter, with_description=True)
    if not found:
        sys.exit(f"hf-adalip optimizers: no name matches {args.filter!r}; leave it out for all")
    for name, description in found:
        print(f"{name:16} {description}")
