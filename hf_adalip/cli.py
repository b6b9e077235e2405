"""`hf-adalip COMMAND`: what can be done from a shell."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .registry import list_optimizers
from .run import run_script


def main() -> None:
    parser = argparse.ArgumentParser(prog="hf-adalip", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = commands.add_parser("optimizers", help="list the optimizers by name")
    listing.add_argument("filter", nargs="?", default="*", help="a wildcard, as in 'ada*'")
    check = commands.add_parser(
        "doctor",
        help="run a Trainer script up to its train(), and say what is wrong",
        description="Runs a script that uses transformers' Trainer, stops it where it would train, "
        "and says what is wrong, why, and the line to change. The exit status is 1 if anything is, "
        "2 if the script does not train.",
    )
    check.add_argument("script")
    check.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's")
    publishing = commands.add_parser(
        "publish",
        help="upload a recipe's run to the Hub",
        description="Uploads the output folder of a recipe: the model, the script with pinned "
        "dependencies, arguments, results, the learning rates of the layers, and a model card. The "
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
        help="leave out what matches, as in 'checkpoint-*'; may be given several times",
    )
    publishing.add_argument(
        "--dry-run", action="store_true", help="show every file and the card, without a network"
    )
    args = parser.parse_args()
    if args.command == "optimizers":
        for name, description in list_optimizers(args.filter, with_description=True):
            print(f"{name:16} {description}")
    elif args.command == "publish":
        sys.exit(publish(args))
    else:
        sys.exit(doctor(args.script, args.arguments))


def doctor(script: str, arguments: list[str]) -> int:
    """Runs a script up to `Trainer.train()` and prints what is wrong there.

    Returns:
        0 for nothing, 1 for something, 2 if the script ended without training.
    """
    from transformers import Trainer

    from .doctor import WrongOptimizerError, examine

    class Reached(BaseException):
        """Ends the script; not an Exception, which it may catch."""

    def stop(self: Trainer, *_: object, **__: object) -> None:
        raise Reached(examine(self))

    train, Trainer.train = Trainer.train, stop
    try:
        run_script(script, arguments)
    except WrongOptimizerError as wrong:  # from `attach` in the script
        findings = [wrong.finding]
    except Reached as reached:
        (findings,) = reached.args
    else:
        print(f"{script} ended without Trainer.train(): nothing to look at", file=sys.stderr)
        return 2
    finally:
        Trainer.train = train
    for finding in findings:
        print(f"- {finding}")
    print({0: "nothing wrong", 1: "1 thing wrong"}.get(len(findings), f"{len(findings)} wrong"))
    return int(bool(findings))


def publish(args: argparse.Namespace) -> int:
    """Uploads a run, or shows what would be; 1 if that cannot be done."""
    from . import hub

    try:
        if args.dry_run:
            files = hub.prepare(args.output_dir, args.repo_id, args.exclude)
            for path, content in files.items():
                size = len(content) if isinstance(content, bytes) else content.stat().st_size
                print(f"{size:13,}  {path}")
            card = files[hub.CARD]
            assert isinstance(card, bytes)  # as all that is made anew
            print(f"\n{hub.CARD}:\n\n{card.decode()}")
        else:
            print(
                hub.publish(
                    args.output_dir, args.repo_id, private=args.private, exclude=args.exclude
                )
            )
    except hub.PublishError as error:
        print(f"hf-adalip publish: error: {error}", file=sys.stderr)
        return 1
    return 0
