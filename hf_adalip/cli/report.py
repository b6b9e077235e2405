"""`hf-adalip report`: the tables and figures of a study."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to a parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        help="write the tables and figures of a study",
        description="Writes report.html, one page with its pictures inside, and report.md with the "
        "pictures beside it, from the folders that hf-adalip sweep wrote. A study that is not "
        "finished has a report that says how much of it is there. The exit status is 1 if there "
        "is nothing to report.",
    )
    parser.add_argument("studies", type=Path, metavar="STUDY_FOLDER", nargs="+")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write the report of one study (default: STUDY_FOLDER/report)",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Writes the reports; 1 if that cannot be done."""
    from ..experiments.report import write_report

    try:
        if args.output and len(args.studies) > 1:
            raise ValueError(
                f"--output {args.output} takes the report of one study, got {len(args.studies)}; "
                "leave it out, and each report goes to its study's folder"
            )
        for folder in args.studies:
            print(write_report(folder, args.output))
    except (ValueError, ImportError, OSError) as error:
        print(f"hf-adalip report: error: {error}", file=sys.stderr)
        return 1
    return 0
