"""The options of the recipes with Trainer, and what is checked before anything is loaded.

Importing it registers the optimizers with transformers.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import difflib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from ...errors import UsageError
from ...integrations.trainer import ModelOptimizer, register, trainer_kwargs
from ...monitor import RATES
from ...registry import get_optimizer_info
from ..checkpoints import check_contents, find_checkpoint
from ..data import shortened
from ..folder import check_folder, default_folder, make_folder
from ..options import (
    AT_LEAST,
    RecipeParser,
    check_bounds,
    check_optimizer,
    check_run_options,
    in_optim_args,
    parse_optim_args,
)
from ..run import check_publishing, load_rates
from .files import OWN_FILES, check_rotation

try:
    from transformers import HfArgumentParser, Trainer, TrainingArguments
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.trainer_utils import SaveStrategy
    from transformers.training_args import OptimizerNames
except ImportError as error:
    raise ImportError(
        "hf_adalip.recipe.trainer.arguments needs transformers: "
        "pip install 'hf-adalip[recipes,trainer]'"
    ) from error

register()

T = TypeVar("T")


@dataclass
class RecipeArguments(TrainingArguments):  # type: ignore[misc]
    """TrainingArguments, and the defaults of a recipe where they are others."""

    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where to write; unless given a fresh folder, outputs/RECIPE-OPTIM-DATE-TIME, "
            "and for latest the newest one."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the results and checkpoints that are there."}
    )
    optim: str = field(
        default="adamlip",
        metadata={
            "help": "adalip, rmslip, adamlip, adalipu, rmslipu, adamlipu, lionlip, or lip-NAME or "
            "secant-NAME for an optimizer NAME of torch; or one of Trainer's, to compare with: "
            "adamw_torch, sgd, ..."
        },
    )
    optim_args: str | None = field(
        default=None,
        metadata={
            "help": "Further arguments of the optimizer, such as "
            "gamma=0.9,layers=tensor,scale_bounds=none. Of those with an S, layers are modules "
            "and S is between 0.1 and 10 unless given here."
        },
    )
    max_grad_norm: float = field(
        default=0.0,
        metadata={
            "help": "Norm to clip gradients to; 0 does not clip. Trainer's 1.0 would scale "
            "gradients by another factor at each step, and S would see it as their change."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave losses that are not finite out of the logs."}
    )
    logging_steps: float = field(default=50, metadata={"help": "Steps between two logs."})
    eval_strategy: str = field(default="epoch", metadata={"help": "no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "no, steps, epoch or best."})
    save_total_limit: int | None = field(
        default=3,
        metadata={"help": "Checkpoints to keep: 2 at least, or 3 where the best is one of them."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a checkpoint, or latest for the last whole one in the output_dir "
            "(from the beginning if there is none yet)."
        },
    )
    push_to_hub: bool = field(
        default=False,
        metadata={"help": "Publish the finished run, once, with HF_TOKEN's token."},
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "USER/NAME, for --push_to_hub."}
    )
    hub_private_repo: bool = field(
        default=False,
        metadata={"help": "For those with access only, for --push_to_hub and trackio."},
    )
    command: str = field(init=False, default="")  # as `parse` read it, to be repeated anywhere
    publish_to: str | None = field(init=False, default=None)  # what --push_to_hub asks for


class _Parser(RecipeParser, HfArgumentParser):  # type: ignore[misc]
    structured = True


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def parse(
    recipe: str, kind: type[T], argv: Sequence[str], description: str, **defaults: Any
) -> tuple[T, RecipeArguments]:
    """The options of a command line, over those of its --config file, over the recipe's.

    The checkpoint that `resume_from_checkpoint` asks for has been found and is whole; the option
    has its path, or None to start from the beginning.

    Args:
        recipe: its name, in the default output folder.
        kind: a dataclass of the recipe's own options.
        argv: the command line.
        description: the text of --help.
        **defaults: of `RecipeArguments`, where the recipe has others.

    Raises:
        UsageError: for an unknown option, a bad value, a folder with results. Nothing has been
            loaded or written then.
    """
    parser = _Parser((kind, RecipeArguments), description=description, formatter_class=_Help)
    parser.set_defaults(**defaults)
    given = parser.expand(argv)
    chosen = parser.parse_args(given)
    _check(chosen)
    own_folder = chosen.output_dir is None
    if own_folder:
        parser.set_defaults(output_dir=str(default_folder(f"{recipe}-{chosen.optim}", chosen)))
    try:
        own, training, *_ = parser.parse_args_into_dataclasses(given, look_for_args_file=False)
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()  # which says so if its tracker is not installed
        optimizer_kwargs(training)
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    if training.push_to_hub and not registered(training):
        raise UsageError(
            "--push_to_hub: a model card can say what torch's optimizers and ours are, and "
            f"{training.optim.value} is neither; choose another --optim, or do not publish"
        )
    if training.metric_for_best_model and training.save_total_limit == 2:
        raise UsageError(
            "--save_total_limit must be at least 3 where the best checkpoint is kept too, got 2: a "
            "save that is interrupted would leave none but the best"
        )
    if training.fp16 and training.device.type == "cpu":
        raise UsageError("--fp16 needs a GPU; --bf16 does not")
    folder = Path(training.output_dir)
    check_folder(folder, OWN_FILES, training)
    fresh = own_folder and not folder.exists()
    if training.save_strategy != SaveStrategy.NO and (limit := training.save_total_limit):
        check_rotation(folder, limit)
    # `run` publishes: Trainer would upload whatever is in the folder, and not what a card needs
    training.publish_to = training.hub_model_id if training.push_to_hub else None
    training.push_to_hub = False
    training.hub_private_repo = training.hub_private_repo or None  # trackio's False is public
    training.resume_from_checkpoint = _checkpoint(training, folder)
    training.command = shlex.join([sys.argv[0], *given])
    if own_folder:
        training.output_dir = _own_folder(folder, fresh, training)
    return own, training


def _checkpoint(training: RecipeArguments, folder: Path) -> str | None:
    """The checkpoint to resume from, which has all that is needed; None for the beginning."""
    found = find_checkpoint(training, folder)
    if found is None:
        return None
    path, _ = found
    # of those that Trainer leaves out of a checkpoint then, the ones that every engine has
    if not any(path.glob("rng_state*.pth")):
        raise UsageError(
            f"--resume_from_checkpoint: {path} has the model alone (--save_only_model), "
            "without the optimizer and the schedule to go on with; choose another, or begin again"
        )
    size = training.world_size
    states = [f"rng_state_{process}.pth" for process in range(size)]
    states = states if size > 1 else ["rng_state.pth"]
    check_contents(path, [*states, f"{RATES}.json"])
    load_rates(path)
    return str(path)


def _own_folder(folder: Path, fresh: bool, training: TrainingArguments) -> str:
    """The folder of a run without --output_dir, the same on all processes: the first one's.

    Made at once if it is fresh, because Trainer would share one with a run that started in the
    same second; and removed at the end if the run fails before anything is in it.
    """
    if fresh and training.process_index == 0:
        folder = make_folder(folder, fresh)
        atexit.register(_remove_if_empty, folder.absolute())
    agreed = [str(folder)]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(agreed)
    return agreed[0]


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


_AT_LEAST = AT_LEAST | {
    "max_grad_norm": 0.0,
    # the one before must outlive a save that is interrupted
    "save_total_limit": 2,
}


_NOT_TAKEN = {
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "a recipe trains and evaluates, always"),
    "auto_find_batch_size": "the results say which batch size was asked for",
    "batch_eval_metrics": "a recipe has its metrics of the whole evaluation",
    "enable_jit_checkpoint": "a recipe that is asked to stop saves a checkpoint by itself",
}


def _check(chosen: argparse.Namespace) -> None:
    """What TrainingArguments would take, and Trainer fail with later or not do."""
    check_bounds(chosen, _AT_LEAST, positive=("learning_rate", "num_train_epochs"))
    if chosen.max_steps < 1 and chosen.max_steps != -1:  # Trainer would go by the epochs
        raise UsageError(
            f"--max_steps must be at least 1, or -1 for --num_train_epochs, got {chosen.max_steps}"
        )
    for name, why in _NOT_TAKEN.items():
        if getattr(chosen, name, False):
            raise UsageError(f"--{name}: leave it out; {why}")
    if chosen.hub_token is not None:  # it would be written into the results
        raise UsageError("--hub_token: a token is not taken here; set HF_TOKEN instead")
    _check_publishing(chosen)
    names = [member.value for member in OptimizerNames]
    if chosen.optim not in names:
        near = [name for name in names if name.startswith(chosen.optim)]
        near = near[:3] or difflib.get_close_matches(chosen.optim, names, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(names)}"
        raise UsageError(f"--optim: unknown optimizer {chosen.optim!r}; {hint}")


def _check_publishing(chosen: argparse.Namespace) -> None:
    for name in ("hub_strategy", "hub_always_push", "hub_revision"):
        value, default = getattr(chosen, name), RecipeArguments.__dataclass_fields__[name].default
        if value != default:
            raise UsageError(f"--{name} {value}: a run is published once, when it is finished")
    private = chosen.hub_private_repo and "trackio" not in str(chosen.report_to)
    check_run_options(chosen, private)
    check_publishing(cast("Any", chosen))


_OWN_OPTION = {"lr": "learning_rate", "weight_decay": "weight_decay"}


def optimizer_kwargs(training: TrainingArguments) -> dict[str, Any]:
    """What Trainer takes for --optim: `trainer_kwargs`, or nothing for an optimizer of its own.

    Raises:
        ValueError, TypeError: for an argument that the optimizer does not take, or ignores
            (UsageError, which is one, if it is one of ours).
    """
    given = parse_optim_args(training.optim_args or "", _OWN_OPTION)
    factory, arguments = Trainer.get_optimizer_cls_and_kwargs(training)
    if factory is ModelOptimizer:
        own = {key: value for key, value in arguments.items() if key != "name"}
        check_optimizer(arguments["name"], own, in_optim_args(given))
        return trainer_kwargs(**arguments)
    if given:
        without = dataclasses.replace(training, optim_args=None)
        if Trainer.get_optimizer_cls_and_kwargs(without)[1] == arguments:
            raise ValueError(
                f"--optim_args {training.optim_args}: Trainer's {training.optim.value} takes none "
                "of these"
            )
    return {}


def registered(training: TrainingArguments) -> str | None:
    """What the registry calls --optim's optimizer; None for one of Trainer's that it has not."""
    factory, _ = Trainer.get_optimizer_cls_and_kwargs(training)
    if factory is ModelOptimizer:
        return cast("str", training.optim.value)
    name: str = factory.__name__
    # transformers and others have an Adafactor or AdamW of their own, with other arguments
    return name.lower() if getattr(torch.optim, name, None) is factory else None


def is_ours(training: TrainingArguments) -> bool:
    """Whether --optim is what `attach` is for."""
    name = registered(training)
    return name is not None and get_optimizer_info(name).is_ours


def check_pretrained(option: str, name: str | None, training: RecipeArguments) -> None:
    """Raises UsageError if the option's value is neither a folder nor may be an id of the Hub, or
    is a folder whose files the run would replace."""
    may_be_id = re.fullmatch(r"(?=.{1,96}$)\w[\w.-]*(/[\w.-]+)?", name or "x")
    if name and not os.path.isdir(name) and not may_be_id:
        raise UsageError(f"--{option}: there is no folder {shortened(name)}")
    folder = Path(str(training.output_dir)).resolve()
    place = Path(name or "").resolve()
    if name and (place == folder or any(map(place.is_relative_to, OWN_FILES(folder)))):
        raise UsageError(
            f"--{option} {name} is in the --output_dir, whose files the run replaces; choose "
            "another --output_dir"
        )
