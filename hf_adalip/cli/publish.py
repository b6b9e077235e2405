"""`hf-adalip publish`: a run on the Hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..errors import PublishError


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command and its options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "publish",
        help="upload a recipe's run to the Hub",
        description="Uploads what a run has written into its output folder: the model, the script "
        "with pinned dependencies, arguments, results, the learning rates of the layers, and a "
        "model card. What else is there, as checkpoints are, is left out, and named. The "
        "token is read from the environment variable HF_TOKEN. After an interruption the same "
        "command sends the rest. The exit status is 1 if nothing was published.",
    )
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--repo_id", required=True, metavar="USER/NAME")
    parser.add_argument("--private", action="store_true", help="for those with access only")
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out what matches, as in 'runs/*'; may be given several times",
    )
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="upload what matches too, although no run writes it; may be given several times",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show every file and the card, without a network"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Uploads a run, or shows what would be; 1 if that cannot be done."""
    from ..publish import hub

    try:
        if args.dry_run:
            files = hub.prepare(args.output_dir, args.repo_id, args.exclude, args.include)
            for path, content in files.items():
                size = len(content) if isinstance(content, bytes) else content.stat().st_size
                print(f"{size:13,}  {path}")
            print("\n".join(hub.left_out(args.output_dir, args.exclude, args.include)))
            card = files[hub.CARD]
            assert isinstance(card, bytes)  # as all that is made anew
            print(f"\n{hub.CARD}:\n\n{card.decode()}")
        else:
            url = hub.publish(
                args.output_dir,
                args.repo_id,
                private=args.private,
                exclude=args.exclude,
                include=args.include,
            )
            lines = hub.left_out(args.output_dir, args.exclude, args.include)
            print("\n".join([*lines, url]))
    except (PublishError, ImportError) as error:  # it needs an extra
        print(f"hf-adalip publish: error: {error}", file=sys.stderr)
        return 1
    return 0
