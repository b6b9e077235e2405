"""The command line of the image recipes: a recipe is a network and defaults, and `main` runs it.

The loop is accelerate's (loop.py), so a recipe runs under `python`, `accelerate launch` and
`torchrun` alike.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import hub
from .checkpoints import RESULTS, find_checkpoint
from .data import DataError, load_image_dataset
from .options import (
    Recipe,
    TrainingArguments,
    UsageError,
    expand_config,
    optimizer_arguments,
    parse,
    scheduler_factory,
    trackers,
)
from .runs import INTERRUPTED, RATES, Interrupted
from .script import SCRIPT

try:
    from .engines import make_accelerator
    from .loop import CONFIG, WEIGHTS, Training, logger
except ImportError as error:
    raise ImportError(
        "hf_adalip.training needs accelerate: pip install 'hf-adalip[recipes]'"
    ) from error

__all__ = ["Recipe", "Training", "TrainingArguments", "main", "output_dir", "train"]


def output_dir(args: TrainingArguments, recipe: Recipe) -> Path:
    """Where the run is to write.

    Raises:
        UsageError: if there are results already, and neither resuming nor overwriting was asked.
    """
    path = Path(args.output_dir or f"outputs/{recipe.name}-{args.optim.lower()}")
    if path.exists() and not path.is_dir():
        raise UsageError(f"--output_dir {path} is a file")
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"--output_dir {path}: cannot write in {nearest}")
    if _own_files(path) and not args.resume_from_checkpoint and not args.overwrite_output_dir:
        raise UsageError(
            f"{path} has results already: choose another --output_dir, or "
            "--overwrite_output_dir, or --resume_from_checkpoint latest"
        )
    return path


def _own_files(folder: Path) -> list[Path]:
    patterns = (RESULTS, WEIGHTS, CONFIG, SCRIPT, f"{RATES}.*", "step_*", "epoch_*")
    return [path for pattern in patterns for path in folder.glob(pattern)]


def train(recipe: Recipe, argv: Sequence[str], command: str = "") -> Training:
    """A recipe's run with these options; nothing is loaded or written before they are checked.

    Raises:
        UsageError: for a bad option.
        DataError: if the data cannot be had.
        Interrupted: if the user stopped it; the run has been saved then.
    """
    args = parse(recipe, argv)
    arguments = optimizer_arguments(args, recipe)
    if args.lr_scheduler_type != "constant":
        scheduler_factory()
    trackers(args)
    if args.push_to_hub:
        try:
            hub.check_run(str(args.hub_model_id))
        except hub.PublishError as error:
            raise UsageError(f"--push_to_hub: {error}") from error
    folder = output_dir(args, recipe)
    checkpoint = find_checkpoint(args, folder)

    accelerator = make_accelerator(args, folder)
    with accelerator.main_process_first():  # the others find what it put in the cache
        data = load_image_dataset(
            args.dataset_name,
            args.image_column_name,
            args.label_column_name,
            args.max_train_samples,
            args.max_eval_samples,
            args.image_size,
        )
    training = Training(args, recipe, arguments, data, accelerator, folder, command)
    if checkpoint is not None:
        training.load(*checkpoint)
    elif args.resume_from_checkpoint is not None:
        logger.info(f"no checkpoint in {folder} yet: starting from the beginning")
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        stale = _own_files(folder) if args.overwrite_output_dir else folder.glob("*_*.partial")
        for path in stale:
            if path.name == SCRIPT:  # it may be what is running
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if args.with_tracking:
        config = {key: _flat(value) for key, value in training.settings.items()}
        accelerator.init_trackers(recipe.name, config)
    _say_what(training)
    try:
        training.run()
    finally:
        accelerator.end_training()
    return training


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> int:
    """The command line of a recipe; returns the exit status.

    0 when the run is finished, 1 if it was not published then as asked, 2 for bad options or data
    (one line on stderr says what), 130 when the user stopped it.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("hf_adalip").setLevel(logging.INFO)
    try:
        training = train(recipe, given, shlex.join([sys.argv[0], *expand_config(given, recipe)]))
    except (UsageError, DataError) as error:
        if first:
            print(f"{recipe.name}: error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stop:
        if first:
            print(f"{recipe.name}: {stop or 'stopped, nothing saved'}", file=sys.stderr)
        return INTERRUPTED
    if training.accelerator.is_main_process:
        print(f"\n{training.table()}\n\nresults in {training.folder}")
        args = training.args
        if args.push_to_hub:
            try:
                hub.publish_run(training.folder, str(args.hub_model_id), args.hub_private_repo)
            except hub.PublishError as error:
                print(error, file=sys.stderr)
                return 1
    return 0


def _say_what(training: Training) -> None:
    data, settings = training.data, training.settings
    logger.info(
        f"{settings['optimizer']}, lr {settings['learning_rate']:g}, on {data.name} "
        f"({len(data.train)} images to train on, {len(data.test)} to evaluate on, "
        f"of its {data.eval_split} split), "
        f"{training.total_steps} steps of {training.steps_per_epoch} to an epoch, "
        f"{training.accelerator.num_processes} process(es) on {training.accelerator.device.type}"
    )


def _flat(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) else json.dumps(value)
