"""`hf-adalip plot`: the losses and learning rates of runs as a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command and its options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plot",
        help="draw the losses and learning rates of runs",
        description="Draws the losses, S and the layers' learning rates over the steps, from the "
        "output folders of recipes, or of a Trainer with attach(trainer, plot=True): of one run "
        "every layer, of several the median and the range of the layers.",
    )
    parser.add_argument("runs", type=Path, metavar="RUN", nargs="+")
    parser.add_argument(
        "--output", type=Path, default=Path("runs.png"), help="the PNG file (default: runs.png)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Draws runs; 1 if that cannot be done."""
    from ..plots import draw_runs, read_run, save_figure

    try:
        save_figure(draw_runs([read_run(folder) for folder in args.runs]), args.output)
    except (ValueError, ImportError, OSError) as error:
        print(f"hf-adalip plot: error: {error}", file=sys.stderr)
        return 1
    print(args.output)
    return 0
