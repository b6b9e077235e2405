"""`hf-adalip sweep`: the runs of a study."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UsageError

INTERRUPTED = 130  # exit status, as the shell's


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to a parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "sweep",
        help="run a script for many optimizers, learning rates and seeds",
        description="Runs a study: every optimizer, learning rate and seed that it has is one run "
        "of its script. Call it again to go on after it was stopped or killed, and call it on "
        "other machines with the same --storage to share the work. What comes behind -- goes to "
        "the script. The exit status is 1 if runs failed, 2 if nothing can be run, 130 if it was "
        "stopped.",
    )
    parser.add_argument(
        "study", metavar="STUDY", help="the name of one of the package's, or a YAML file"
    )
    parser.add_argument(
        "--output_dir", type=Path, help="default: studies/STUDY, with the scale in its name"
    )
    parser.add_argument(
        "--scale",
        default="",
        metavar="KEY=N,...",
        help="make it smaller: seeds=N, and what the study has, as in images=10000,epochs=5",
    )
    parser.add_argument(
        "--with",
        dest="extras",
        default="",
        metavar="NAME,...",
        help="run extras of the study too; control: every base at α × median(S)",
    )
    parser.add_argument("--script", help="another script, a file or the name of a module")
    parser.add_argument(
        "--optim",
        nargs="+",
        metavar="NAME",
        help="these optimizers alone: with S as adamlip, which comes with its base, or as "
        "BASE/FORM, or any other that the script has",
    )
    parser.add_argument(
        "--learning_rate",
        nargs="+",
        type=float,
        metavar="α",
        help="learning rates, but of an optimizer that has its own in the study",
    )
    parser.add_argument(
        "--schedules", nargs="+", metavar="NAME", help="these of the study's alone, as constant"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="other seeds")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="of a database, for several machines: sqlite:///FILE, mysql://..., postgresql://..., "
        "redis://... (default: journal.log in the output folder)",
    )
    parser.add_argument("--retry_failed", action="store_true", help="run again what failed")
    parser.add_argument(
        "--recipes", type=Path, default=Path("recipes"), help="folder (default: recipes)"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="say how many runs there are, and which is the first"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs a study; returns the exit status."""
    try:
        return _run(args)
    except (UsageError, ImportError) as error:
        print(f"hf-adalip sweep: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # no room, or no right to write there
        print(f"hf-adalip sweep: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hf-adalip sweep: stopped; the same command goes on", file=sys.stderr)
        return INTERRUPTED


def _run(args: argparse.Namespace) -> int:
    from ..experiments.reading import Changes, load_study
    from ..experiments.study import STUDY
    from ..experiments.sweep import Place, check_workers, sweep

    check_workers(args.workers)
    load = partial(
        load_study,
        args.study,
        _scale(args.scale),
        changes=Changes(args.script, args.optim, args.learning_rate, args.schedules, args.seeds),
        rest=args.rest,
    )
    study = load(extras=[extra for extra in args.extras.split(",") if extra])
    if args.dry_run:
        return _say_what(study, args.recipes)
    folder = args.output_dir or Path("studies", study.full_name)
    if Path(args.study).resolve() == (folder / STUDY).resolve():
        raise UsageError(
            f"{args.study} is what a sweep wrote in its own folder, with the ends of paths alone; "
            "to go on there, repeat the command that began it; to run it again, say another "
            "--output_dir"
        )
    place = Place(folder, args.storage, args.recipes, args.workers)
    say = partial(print, flush=True)
    counts = sweep(study, place, lambda extras: load(extras=extras), args.retry_failed, say)
    return 1 if counts["failed"] else 0


def _say_what(study: Any, recipes: Path) -> int:
    from ..experiments.study import command_words
    from ..experiments.trial import shown

    cells = study.cells()
    words = command_words(study.script, recipes)
    options = study.options(cells[0], cells[0].learning_rate, f"studies/{study.full_name}/runs/...")
    print(f"{study.full_name}: {len(cells):,} runs; the first one is")
    print(shown(["python", *words, *options]))
    return 0


def _scale(text: str) -> dict[str, int]:
    found = {}
    for part in filter(None, text.split(",")):
        key, _, number = part.partition("=")
        if not number.isdecimal():
            raise UsageError(f"--scale must be KEY=N,KEY=N, got {text!r}")
        found[key.strip()] = int(number)
    return found
