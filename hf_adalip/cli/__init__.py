"""`hf-adalip COMMAND`: what can be done from a shell."""

from __future__ import annotations

import argparse
import sys

from ..version import __version__
from . import doctor, optimizers, plot, publish, report, sweep


def main() -> None:
    """The command `hf-adalip`."""
    parser = argparse.ArgumentParser(prog="hf-adalip", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (optimizers, doctor, publish, plot, sweep, report):
        command.add_parser(commands).set_defaults(run=command.run)
    given, rest = sys.argv[1:], list[str]()
    if given[:1] == ["sweep"] and "--" in given:  # whose script gets the rest
        at = given.index("--")
        given, rest = given[:at], given[at + 1 :]
    args = parser.parse_args(given)
    args.rest = rest
    if (status := args.run(args)) is not None:
        sys.exit(status)
