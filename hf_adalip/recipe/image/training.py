"""The command line of the image recipes: a recipe is a network and defaults, and `main` runs it.

The loop is accelerate's (loop.py), so a recipe runs under `python`, `accelerate launch` and
`torchrun` alike.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...diagnose.checks import TRIAL
from ...errors import DataError, UsageError
from ...files import PARTIAL, saving
from ...monitor import NORMS
from ..checkpoints import SAVED, find_checkpoint, finish_replacing
from ..data import DIGITS
from ..folder import OwnFiles, check_folder, default_folder, make_folder
from ..run import check_publishing, conclude, exit_status
from .data import ImageData, load_image_dataset
from .options import (
    Recipe,
    TrainingArguments,
    make_parser,
    optimizer_arguments,
    parse,
    scheduler_factory,
    trackers,
)
from .results import is_finite, said_of_end, table

try:
    from accelerate.utils import broadcast_object_list, gather_object

    from .engines import make_accelerator
    from .loop import CONFIG, WEIGHTS, Training, logger
except ImportError as error:
    raise ImportError(
        "hf_adalip.recipe.image.training needs accelerate: pip install 'hf-adalip[recipes]'"
    ) from error

__all__ = ["Recipe", "Training", "TrainingArguments", "main", "output_dir", "train"]


OWN_FILES = OwnFiles("|".join(map(re.escape, (WEIGHTS, CONFIG, NORMS))), SAVED)


def output_dir(args: TrainingArguments, recipe: Recipe) -> Path:
    """Where the run is to write.

    Raises:
        UsageError: if there are results already, and neither resuming nor overwriting was asked,
            or there can be none.
    """
    name = f"{recipe.name}-{args.optim.lower()}"
    path = Path(args.output_dir) if args.output_dir else default_folder(name, args)
    check_folder(path, OWN_FILES, args)
    return path


def _elsewhere_in_a_trial(args: TrainingArguments) -> TrainingArguments:
    """The doctor's run of a recipe leaves nothing, and touches nothing that is there."""
    if (folder := os.environ.get(TRIAL)) is None:
        return args
    return replace(
        args,
        output_dir=folder,
        overwrite_output_dir=False,
        checkpointing_steps=None,
        resume_from_checkpoint=None,
        with_tracking=False,
        push_to_hub=False,
    )


def train(recipe: Recipe, argv: Sequence[str], command: str = "") -> Training:
    """A recipe's run with these options; nothing is loaded or written before they are checked.

    Raises:
        UsageError: for a bad option.
        DataError: if the data cannot be had.
        Interrupted: if the user stopped it; the run has been saved then.
        SaveError: if there is no room for what it writes.
    """
    args = _elsewhere_in_a_trial(parse(recipe, argv))
    arguments = optimizer_arguments(args, recipe)
    if args.lr_scheduler_type != "constant":
        scheduler_factory()
    trackers(args)
    for name in ("image_column_name", "label_column_name"):
        asked = (value := getattr(args, name)) != recipe.defaults.get(name)
        if args.dataset_name == DIGITS and asked:
            raise UsageError(f"--{name} {value}: the digits have no columns; leave it out")
    check_publishing(args)
    folder = output_dir(args, recipe)
    fresh = args.output_dir is None and not folder.exists()
    if args.resume_from_checkpoint:
        finish_replacing(folder)
    checkpoint = find_checkpoint(args, folder)

    accelerator = make_accelerator(args, folder)
    data = _load(args, accelerator)
    training = Training(args, recipe, arguments, data, accelerator, folder, command)
    if checkpoint is not None:
        training.load(*checkpoint)
    elif args.resume_from_checkpoint is not None:
        logger.info(f"no checkpoint in {folder} yet: starting from the beginning")
    if accelerator.is_main_process:
        folder = make_folder(folder, fresh)
        OWN_FILES.clear(folder, args.overwrite_output_dir, lambda path: path.suffix == PARTIAL)
    training.folder = broadcast_object_list([folder])[0]  # each process has read its own clock
    places = accelerator.project_configuration
    places.project_dir = places.logging_dir = str(training.folder)
    _say_what(training)
    with saving(training.folder):  # trackers write there too
        if args.with_tracking:
            config = {key: _flat(value) for key, value in training.settings.items()}
            accelerator.init_trackers(recipe.name, config)
        try:
            training.run()
        finally:
            accelerator.end_training()
    return training


def _load(args: TrainingArguments, accelerator: Any) -> ImageData:
    """The data, or a DataError on all processes if one of them cannot have them."""
    data, problem = None, None
    with accelerator.main_process_first():  # the others find what it put in the cache
        try:
            data = load_image_dataset(
                args.dataset_name,
                args.image_column_name,
                args.label_column_name,
                args.max_train_samples,
                args.max_eval_samples,
                args.image_size,
            )
        except DataError as error:
            problem = str(error)
    problems = [problem for problem in gather_object([problem]) if problem]
    if data is None or problems:
        raise DataError(problems[0])
    return data


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> int:
    """The command line of a recipe; returns the exit status, as `exit_status` has it."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("hf_adalip").setLevel(logging.INFO)

    def run(given: Sequence[str]) -> None:
        command = shlex.join([sys.argv[0], *make_parser(recipe).expand(given)])
        training = train(recipe, given, command)
        if training.accelerator.is_main_process:
            epochs = training.progress.epochs
            conclude(
                recipe.name,
                training.folder,
                table(epochs, training.rates, training.nonfinite_steps),
                said_of_end(epochs[-1], training.data.num_classes),
                is_finite(epochs[-1]),
                training.args.hub_model_id if training.args.push_to_hub else None,
                training.args.hub_private_repo,
            )

    return exit_status(recipe.name, run, list(sys.argv[1:] if argv is None else argv))


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
