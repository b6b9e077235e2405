"""`hf-adalip doctor`: runs a script for a few steps, and says what is wrong."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to a parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="run a training script for a few steps, and say what is wrong",
        description="Runs a script, with transformers' Trainer or a loop of its own, stops it "
        "after 20 steps of its optimizer, and says what is wrong, why, and the line to change. "
        "Recipes and Trainers write to a folder that is removed, and resume nothing. "
        "The exit status is 1 if anything is, and 2 if nothing is found and no optimizer with a "
        "learning rate per layer, and no Secant, took a step.",
    )
    parser.add_argument("script", metavar="SCRIPT", help="a Python file that trains")
    called_with = parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="what SCRIPT is called with, options too"
    )
    called_with.required = False  # which argparse says of any REMAINDER
    return parser


def run(args: argparse.Namespace) -> int:
    """Watches a script for a few steps; returns the exit status."""
    return doctor(args.script, args.arguments)


def doctor(script: str, arguments: list[str]) -> int:
    """Runs a script for a few steps, with our names registered if it has transformers' Trainer, and
    prints what is wrong; returns the exit status, as `hf_adalip.diagnose.trial.doctor` has it."""
    from ..diagnose import trial
    from ..integrations.trainer import register

    return trial.doctor(script, arguments, register)
