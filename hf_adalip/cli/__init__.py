"""`hf-adalip COMMAND`: what can be done from a shell."""

from __future__ import annotations

import argparse
import sys

from ..version import __version__
from . import doctor, optimizers, plot, publish, report


def main() -> None:
    """The command `hf-adalip`."""
    parser = argparse.ArgumentParser(prog="hf-adalip", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (optimizers, doctor, publish, plot, report):
        command.add_parser(commands).set_defaults(run=command.run)
    args = parser.parse_args()
    if (status := args.run(args)) is not None:
        sys.exit(status)
