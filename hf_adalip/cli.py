"""`hf-adalip COMMAND`: what can be done from a shell."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .registry import list_optimizers
from .version import __version__


def main() -> None:
    """The command `hf-adalip`."""
    parser = argparse.ArgumentParser(prog="hf-adalip", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = commands.add_parser("optimizers", help="list the optimizers by name")
    listing.add_argument("filter", nargs="?", default="*", help="a wildcard, as in 'ada*'")
    check = commands.add_parser(
        "doctor",
        help="run a training script for a few steps, and say what is wrong",
        description="Runs a script, with transformers' Trainer or a loop of its own, stops it "
        "after 20 steps of its optimizer, and says what is wrong, why, and the line to change. "
        "Recipes and Trainers write to a folder that is removed, and resume nothing. "
        "The exit status is 1 if anything is, and 2 if nothing is found and no optimizer with a "
        "learning rate per layer took a step.",
    )
    check.add_argument("script", metavar="SCRIPT", help="a Python file that trains")
    called_with = check.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="what SCRIPT is called with, options too"
    )
    called_with.required = False  # which argparse says of any REMAINDER
    publishing = commands.add_parser(
        "publish",
        help="upload a recipe's run to the Hub",
        description="Uploads what a run has written into its output folder: the model, the script "
        "with pinned dependencies, arguments, results, the learning rates of the layers, and a "
        "model card. What else is there, as checkpoints are, is left out, and named. The "
        "token is read from the environment variable HF_TOKEN. After an interruption the same "
        "command sends the rest. The exit status is 1 if nothing was published.",
    )
    publishing.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR")
    publishing.add_argument("--repo_id", required=True, metavar="USER/NAME")
    publishing.add_argument("--private", action="store_true", help="for those with access only")
    publishing.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out what matches, as in 'runs/*'; may be given several times",
    )
    publishing.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="upload what matches too, although no run writes it; may be given several times",
    )
    publishing.add_argument(
        "--dry-run", action="store_true", help="show every file and the card, without a network"
    )
    plotting = commands.add_parser(
        "plot",
        help="draw the losses and learning rates of runs",
        description="Draws the losses, S and the layers' learning rates over the steps, from the "
        "output folders of recipes, or of a Trainer with attach(trainer, plot=True): of one run "
        "every layer, of several the median and the range of the layers.",
    )
    plotting.add_argument("runs", type=Path, metavar="RUN", nargs="+")
    plotting.add_argument(
        "--output", type=Path, default=Path("runs.png"), help="the PNG file (default: runs.png)"
    )
    args = parser.parse_args()
    if args.command == "optimizers":
        found = list_optimizers(args.filter, with_description=True)
        if not found:
            sys.exit(f"hf-adalip optimizers: no name matches {args.filter!r}; leave it out for all")
        for name, description in found:
            print(f"{name:16} {description}")
    elif args.command == "publish":
        sys.exit(publish(args))
    elif args.command == "plot":
        sys.exit(plot(args.runs, args.output))
    else:
        from .trial import doctor  # which imports transformers, if it is there

        sys.exit(doctor(args.script, args.arguments))


def plot(folders: Sequence[Path], output: Path) -> int:
    """Draws runs; 1 if that cannot be done."""
    from .plots import draw_runs, read_run, save_figure

    try:
        save_figure(draw_runs([read_run(folder) for folder in folders]), output)
    except (ValueError, ImportError, OSError) as error:
        print(f"hf-adalip plot: error: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


def publish(args: argparse.Namespace) -> int:
    """Uploads a run, or shows what would be; 1 if that cannot be done."""
    from . import hub

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
    except (hub.PublishError, ImportError) as error:  # it needs an extra
        print(f"hf-adalip publish: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    main()
