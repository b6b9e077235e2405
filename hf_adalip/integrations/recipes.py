"""What the recipes with transformers.Trainer share: options, resuming, Ctrl-C and results.

A recipe makes its model and data and a Trainer; the rest is here:

    args, training = parse("causal_lm", Arguments, RecipeArguments, argv, description=__doc__)
    ...
    optimizer = optimizer_kwargs(training)
    trainer = Trainer(model=model, args=training, ..., **optimizer)
    if optimizer:
        attach(trainer)
    run(trainer, settings)

Importing it registers the optimizers with transformers.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import difflib
import json
import math
import os
import re
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from ..checkpoints import (
    STAGED,
    check_contents,
    find_checkpoint,
    replacing,
    write_manifest,
)
from ..data import on_hub, shortened
from ..diagnose.checks import diverged
from ..errors import DataError, DivergedError, Interrupted, SaveError, UsageError
from ..files import MANIFEST, RESULTS, saving, whole
from ..monitor import LayerRateHistory, layerwise, secant_summary
from ..options import (
    OneLineErrors,
    check_bounds,
    check_hub_options,
    check_optimizer,
    in_optim_args,
    read_config,
)
from ..publish import hub
from ..publish.script import SCRIPT, running_script, versions
from ..runs import (
    INTERRUPTED,
    NOT_SAVED,
    RATES,
    RECORDS,
    VERSIONS,
    any_asked_to_stop,
    asked_to_stop,
    check_folder,
    check_publishing,
    check_same_run,
    default_folder,
    device_name,
    load_rates,
    make_folder,
    write_results,
)
from .arguments import parse_arguments
from .trainer import ModelOptimizer, register, trainer_kwargs

try:
    from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.trainer_utils import SaveStrategy
    from transformers.training_args import OptimizerNames
except ImportError as error:
    raise ImportError(
        "hf_adalip.integrations.recipes needs transformers: "
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
            "help": "adalip, rmslip, adamlip, adalipu, rmslipu, adamlipu, or lip-NAME or "
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
        default=2, metadata={"help": "Checkpoints to keep, 2 at least."}
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


class _Parser(OneLineErrors, HfArgumentParser):  # type: ignore[misc]
    pass


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
    parser = _Parser(
        (kind, RecipeArguments), description=description, formatter_class=_Help, allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML file of options, which the command line overrides")
    parser.set_defaults(**defaults)
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    found, rest = config.parse_known_args(argv)
    parts: tuple[Any, ...] = (kind, RecipeArguments)
    known = [entry.name for part in parts for entry in dataclasses.fields(part)]
    given = [*(_config_options(found.config, known) if found.config else ()), *rest]
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
    if training.push_to_hub and not _registered(training):
        raise UsageError(
            "--push_to_hub: a model card can say what torch's optimizers and ours are, and "
            f"{training.optim.value} is neither; choose another --optim, or do not publish"
        )
    if training.fp16 and training.device.type == "cpu":
        raise UsageError("--fp16 needs a GPU; --bf16 does not")
    folder = Path(training.output_dir)
    check_folder(folder, _own_files, training)
    fresh = own_folder and not folder.exists()
    if training.save_strategy != SaveStrategy.NO and (limit := training.save_total_limit):
        _check_rotation(folder, limit)
    # `run` publishes: Trainer would upload whatever is in the folder, and not what a card needs
    training.publish_to = training.hub_model_id if training.push_to_hub else None
    training.push_to_hub = False
    training.hub_private_repo = training.hub_private_repo or None  # trackio's False is public
    checkpoint = find_checkpoint(cast("Any", training), folder)
    # of those that Trainer leaves out of a checkpoint then, the ones that every engine has
    if checkpoint and not any(checkpoint[0].glob("rng_state*.pth")):
        raise UsageError(
            f"--resume_from_checkpoint: {checkpoint[0]} has the model alone (--save_only_model), "
            "without the optimizer and the schedule to go on with; choose another, or begin again"
        )
    if checkpoint:
        size = training.world_size
        states = [f"rng_state_{process}.pth" for process in range(size)]
        states = states if size > 1 else ["rng_state.pth"]
        check_contents(checkpoint[0], [*states, f"{RATES}.json"])
        load_rates(checkpoint[0])
    training.resume_from_checkpoint = str(checkpoint[0]) if checkpoint else None
    training.command = shlex.join([sys.argv[0], *given])
    if own_folder:
        training.output_dir = _own_folder(folder, fresh, training)
    return own, training


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


def _config_options(path: str, known: Collection[str]) -> list[str]:
    """A YAML file as command-line options, so that both are read by the same rules."""
    options: list[str] = []
    for key, value in read_config(path, known).items():
        if isinstance(value, list):
            options += [f"--{key}", *map(str, value)]
        elif value is not None:
            written = json.dumps(value) if isinstance(value, dict) else value
            options.append(f"--{key}={'no' if value is False else written}")  # which YAML reads so
    return options


_AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_train_samples": 1,
    "max_eval_samples": 1,
    "seed": 0,
    "data_seed": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    # the one before must outlive a save that is interrupted
    "save_total_limit": 2,
}


def _check(chosen: argparse.Namespace) -> None:
    """What TrainingArguments would take, and Trainer fail with later or not do."""
    check_bounds(chosen, _AT_LEAST)
    for name in ("learning_rate", "num_train_epochs"):
        if not 0 < (value := getattr(chosen, name)) < math.inf:
            raise UsageError(f"--{name} must be a positive number, got {value}")
    if chosen.max_steps < 1 and chosen.max_steps != -1:  # Trainer would go by the epochs
        raise UsageError(
            f"--max_steps must be at least 1, or -1 for --num_train_epochs, got {chosen.max_steps}"
        )
    for name in ("do_train", "do_eval", "do_predict"):
        if getattr(chosen, name):
            raise UsageError(f"--{name}: leave it out; a recipe trains and evaluates, always")
    if chosen.hub_token is not None:  # it would be written into the results
        raise UsageError("--hub_token: a token is not taken here; set HF_TOKEN instead")
    _check_publishing(chosen)
    names = [member.value for member in OptimizerNames]
    if chosen.optim not in names:
        near = [name for name in names if name.startswith(chosen.optim)]
        near = near[:3] or difflib.get_close_matches(chosen.optim, names, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(names)}"
        raise UsageError(f"--optim: unknown optimizer {chosen.optim!r}; {hint}")
    if chosen.resume_from_checkpoint and chosen.overwrite_output_dir:
        raise UsageError("--resume_from_checkpoint and --overwrite_output_dir exclude each other")


def _check_publishing(chosen: argparse.Namespace) -> None:
    for name in ("hub_strategy", "hub_always_push", "hub_revision"):
        value, default = getattr(chosen, name), RecipeArguments.__dataclass_fields__[name].default
        if value != default:
            raise UsageError(f"--{name} {value}: a run is published once, when it is finished")
    private = chosen.hub_private_repo and "trackio" not in str(chosen.report_to)
    check_hub_options(chosen.push_to_hub, chosen.hub_model_id, private)
    check_publishing(cast("Any", chosen))


_OWN_OPTION = {"lr": "learning_rate", "weight_decay": "weight_decay"}


def optimizer_kwargs(training: TrainingArguments) -> dict[str, Any]:
    """What Trainer takes for --optim: `trainer_kwargs`, or nothing for an optimizer of its own.

    Raises:
        ValueError, TypeError: for an argument that the optimizer does not take, or ignores
            (UsageError, which is one, if it is one of ours).
    """
    given = parse_arguments(training.optim_args or "")
    for key in set(given) & set(_OWN_OPTION):
        raise ValueError(f"--optim_args: give {key} as --{_OWN_OPTION[key]}")
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


def _registered(training: TrainingArguments) -> str | None:
    """What the registry calls --optim's optimizer; None for one of Trainer's that it has not."""
    factory, _ = Trainer.get_optimizer_cls_and_kwargs(training)
    if factory is ModelOptimizer:
        return cast("str", training.optim.value)
    name: str = factory.__name__
    # transformers and others have an Adafactor or AdamW of their own, with other arguments
    return name.lower() if getattr(torch.optim, name, None) is factory else None


class _Run(TrainerCallback):  # type: ignore[misc]
    """Records the layers' learning rates, makes checkpoints whole, and stops when asked."""

    def __init__(self, trainer: Trainer, settings: Mapping[str, Any]) -> None:
        self.trainer, self.settings = trainer, settings
        self.rates = LayerRateHistory()
        self.stop_asked = self.stopped = False
        self.save_after_evaluation = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step == 1 or step % math.ceil(state.max_steps / RECORDS) == 0:
            optimizer = layerwise(kwargs["optimizer"])
            if optimizer and state.is_world_process_zero:
                self.rates.record(step, optimizer.layer_learning_rates())
        # processes ask one another now and then only
        accelerator = self.trainer.accelerator
        ask = accelerator.num_processes == 1 or step % 20 == 0
        if ask and any_asked_to_stop(self, accelerator) and step < state.max_steps:
            self.stopped = control.should_training_stop = control.should_save = True
        if state.epoch == int(state.epoch):  # a run resumed from here would not evaluate
            self.save_after_evaluation, control.should_save = control.should_save, False
        # a log has the mean loss since the last; a resumed run must begin where a log ended
        control.should_log |= control.should_save

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped and not self.save_after_evaluation:  # within the epoch, and saved
            control.should_log = control.should_evaluate = control.should_save = False
            return
        control.should_save |= self.save_after_evaluation
        control.should_log = True  # so that the logs have the mean loss of the epoch
        self.save_after_evaluation = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            self.rates.save(folder / f"{RATES}.json")
            (folder / MANIFEST).unlink(missing_ok=True)
            write_manifest(folder, state.global_step, self.settings)


def run(trainer: Trainer, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Trains, from the checkpoint of `resume_from_checkpoint` if there is one, and writes results.

    The output folder gets the model, `all_results.json`, the script that ran as `train.py` and, if
    the optimizer has an S, the layers' learning rates. Stopped by Ctrl-C or SIGTERM it saves a
    checkpoint at the end of the step; a second Ctrl-C does not wait.

    Args:
        trainer: not trained yet, its arguments from `parse`.
        settings: what results and checkpoints should say of model and data; "recipe",
            "dataset_name" and "dataset_fingerprint" at least.

    Returns:
        what is in `all_results.json`.

    Raises:
        UsageError: if the checkpoint is of a run with other settings.
        Interrupted: if the user stopped it; the run has been saved then.
        DivergedError: if a loss of the finished run is not finite; it is not published then.
        PublishError: if the finished run was not published as asked.
        SaveError: if there is no room for what it writes.
    """
    args = cast("RecipeArguments", trainer.args)
    folder, checkpoint = Path(str(args.output_dir)), args.resume_from_checkpoint
    settings = json.loads(json.dumps({**settings, **_settings(trainer)}))
    same = {**_same_arguments(args), **settings}
    script = running_script()
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and batch > (size := len(trainer.train_dataset)):
        raise DataError(
            f"--dataloader_drop_last leaves nothing of {size} samples to train on: a batch has "
            f"{batch}; choose a smaller --per_device_train_batch_size"
        )
    watch = _Run(trainer, same)
    if checkpoint:
        saved = json.loads(Path(checkpoint, MANIFEST).read_text())["settings"]
        check_same_run(Path(checkpoint), saved, same)
        watch.rates = load_rates(Path(checkpoint))
    if args.should_save:
        make_folder(folder)
        _clean(folder, checkpoint, args.overwrite_output_dir)
    trainer.add_callback(watch)
    try:
        with asked_to_stop(watch), saving(folder):
            seconds = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
    except SaveError as error:
        unfinished = folder / f"checkpoint-{trainer.state.global_step}"
        if not unfinished.exists() or (unfinished / MANIFEST).exists():
            raise
        shutil.rmtree(unfinished, ignore_errors=True)
        said = str(error).removeprefix(f"{folder} ")  # torch does not say where
        raise SaveError(said if said == str(error) else f"{unfinished} {said}") from error
    with replacing(folder) if args.should_save else nullcontext(folder / STAGED) as staged:
        trainer.accelerator.wait_for_everyone()
        results = _finish(trainer, watch, settings, script, seconds, staged)
        trainer.accelerator.wait_for_everyone()  # each process may have written a part
    if watch.stopped:
        on = "to go on, run the same command with --resume_from_checkpoint latest"
        if args.save_only_model:
            on = "with --save_only_model, no run can go on from there"
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps} and saved "
            f"{folder / f'checkpoint-{trainer.state.global_step}'}; {on}"
        )
    if args.should_save:
        print(f"\n{_table(results, watch.rates)}\n\nresults in {folder}")
    losses = [results[name] for name in ("train_loss", "eval_loss") if name in results]
    if bad := [loss for loss in losses if not math.isfinite(loss)]:
        raise DivergedError(str(diverged(bad[0], "loss of the finished run", None)))
    if args.should_save and args.publish_to:
        hub.publish_run(folder, args.publish_to, bool(args.hub_private_repo))
    return results


def _finish(
    trainer: Trainer,
    watch: _Run,
    settings: Mapping[str, Any],
    script: str | None,
    seconds: float,
    folder: Path,
) -> dict[str, Any]:
    """Evaluates, and writes model and results into a folder; returns the results."""
    args = cast("RecipeArguments", trainer.args)
    checkpoint = args.resume_from_checkpoint
    epochs = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    best = None if watch.stopped else _best_step(trainer)
    if not watch.stopped:
        # on all processes: where the model is sharded, each has a part of it; and before it is
        # evaluated, for which bf16_full_eval and fp16_full_eval round its weights
        readme = folder.parent / "README.md"
        if args.should_save and readme.exists() and hasattr(trainer.model, "peft_config"):
            shutil.copy(readme, folder)  # peft writes into the one that is there
        trainer.save_model(str(folder))
    if not watch.stopped and not _evaluated(trainer, best):
        trainer.evaluate()
        if best is None:
            epochs.append(trainer.state.log_history[-1])
    results = {
        **_scores(trainer.state.log_history),
        **({} if best is None else {"best_step": best}),
        "finished": not watch.stopped,
        "epoch": trainer.state.epoch,
        "step": trainer.state.global_step,
        **settings,
        "on_hub": on_hub(settings["dataset_name"], settings.get("model_name_or_path")),
        **_facts(trainer),
        "resumed_from": checkpoint,
        "seconds_since_then" if checkpoint else "seconds": seconds,
        "command": args.command,
        "epochs": epochs,
    }
    if args.should_save:
        if watch.rates.steps:
            watch.rates.save(folder / f"{RATES}.json")
            title = f"{settings['recipe']}, {settings['optimizer']}, lr {args.learning_rate:g}"
            with saving(folder / f"{RATES}.png"):
                watch.rates.plot(folder / f"{RATES}.png", title)
        if script:
            whole(folder / SCRIPT, lambda path: path.write_bytes(script.encode()))
        write_results(folder, results)
    return results


_MAY_CHANGE = re.compile(
    # where it runs and writes, how fast, and what it says of itself
    r"(overwrite_)?output_dir|use_cpu|local_rank|ddp_.*|dataloader_(?!drop_last).*|debug"
    r"|torch_empty_cache_steps|skip_memory_metrics|log(ging)?_.*|include_num_input_tokens_seen"
    r"|disable_tqdm|report_to|run_name|project|trackio_.*|push_to_hub|hub_.*|publish_to|command"
    # evaluation and saving
    r"|do_.*|(batch_)?eval_.*|(bf16|fp16)_full_eval|per_device_eval_batch_size|include_for_metrics"
    r"|prediction_loss_only|load_best_model_at_end|metric_for_best_model|greater_is_better"
    r"|save_.*|enable_jit_checkpoint"
    # how it is resumed, and how far it goes, which a schedule says (`_settings`)
    r"|resume_from_checkpoint|ignore_data_skip|restore_callback_states_from_checkpoint"
    r"|num_train_epochs|max_steps"
    # in `_settings` as what they come to
    r"|optim|optim_args"
)


def _same_arguments(args: TrainingArguments) -> dict[str, Any]:
    """What a run and the one that it resumes must have in common, of Trainer's arguments."""
    found = {k: v for k, v in args.to_dict().items() if not _MAY_CHANGE.fullmatch(k)}
    same: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return same


def _settings(trainer: Trainer) -> dict[str, Any]:
    """What they must have in common besides, and what the results say of Trainer's arguments."""
    args = trainer.args
    constant = args.lr_scheduler_type == "constant"
    names = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "seed", "data_seed")
    _, arguments = Trainer.get_optimizer_cls_and_kwargs(args)
    arguments = {key: value for key, value in arguments.items() if key != "name"}
    return {
        "optimizer": _registered(args) or args.optim.value,
        "optimizer_arguments": {"weight_decay": args.weight_decay, **arguments},
        "lr_scheduler_type": args.lr_scheduler_type.value,
        # a constant rate can be gone on with for longer; a schedule has one length
        "scheduled_epochs": None if constant else args.num_train_epochs,
        "scheduled_steps": None if constant or args.max_steps < 0 else args.max_steps,
        **{name: getattr(args, name) for name in names},
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "num_processes": args.world_size,
        "mixed_precision": trainer.accelerator.mixed_precision,
    }


_OWN = re.compile(
    rf"{re.escape(RESULTS)}|{RATES}\.(json|png)|{re.escape(SCRIPT)}|checkpoint-[0-9]+"
    r"|config\.json|training_args\.bin|tokenizer(_config)?\.json|special_tokens_map\.json"
    r"|added_tokens\.json|chat_template\.jinja|vocab\.(txt|json)|merges\.txt"
    r"|generation_config\.json|adapter_config\.json|adapter_model\.safetensors"
    r"|model(-[0-9]+-of-[0-9]+)?\.safetensors|model\.safetensors\.index\.json"
)


def _own_files(folder: Path) -> list[Path]:
    """What a run leaves in its folder; what else is there is the user's."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _OWN.fullmatch(path.name))


def _check_rotation(folder: Path, limit: int) -> None:
    """Trainer takes all that begins as a checkpoint for one, and deletes those of the lowest
    numbers.

    Raises:
        UsageError: if it would count a folder that is not its own.
    """
    names = [path.name for path in folder.glob("checkpoint-*") if path.is_dir()]
    if others := sorted(name for name in names if re.match("checkpoint-[0-9]+[^0-9]", name)):
        raise UsageError(
            f"--save_total_limit {limit}: Trainer would count {others[0]} in {folder} among its "
            "checkpoints, and might delete it; move it, or choose another --output_dir"
        )


def _clean(folder: Path, checkpoint: str | None, overwrite: bool) -> None:
    """Removes what --overwrite_output_dir replaces, or the checkpoints whose saving was cut off,
    which Trainer would count among those to keep."""
    # the script may be what is running; it is replaced at the end
    stale = [path for path in _own_files(folder) if overwrite and path.name != SCRIPT]
    if checkpoint and Path(checkpoint).parent == folder:
        checkpoints = [path for path in _own_files(folder) if path.name.startswith("checkpoint-")]
        stale = [path for path in checkpoints if not (path / MANIFEST).exists()]
    for path in stale:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _best_step(trainer: Trainer) -> int | None:
    """The step of the checkpoint that --load_best_model_at_end went back to, if it did."""
    state = trainer.state
    found = trainer.args.load_best_model_at_end and state.best_model_checkpoint
    return int(state.best_global_step) if found else None


def _evaluated(trainer: Trainer, best: int | None) -> bool:
    """Whether the last evaluation was of the model as it is now, or there can be none."""
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    now = trainer.state.global_step
    return trainer.eval_dataset is None or (steps[-1:] == [now] and best in (None, now))


_TIMES = ("_runtime", "_per_second")


def _scores(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last evaluation, and the mean training loss of the last epoch from the logs."""
    evaluations = [entry for entry in history if "eval_loss" in entry]
    last = evaluations[-1] if evaluations else {}
    found = {k: v for k, v in last.items() if k.startswith("eval_") and not k.endswith(_TIMES)}
    logs = [entry for entry in history if "loss" in entry]
    steps = [0, *(entry["step"] for entry in logs)]
    begin = math.ceil(logs[-1]["epoch"]) - 1 if logs else 0
    weighted = [
        (entry["loss"], step - before)
        for entry, before, step in zip(logs, steps, steps[1:], strict=False)
        if entry["epoch"] > begin
    ]
    if count := sum(weight for _, weight in weighted):
        found["train_loss"] = sum(loss * weight for loss, weight in weighted) / count
    return found


_LIBRARIES = ("transformers", "scipy", "peft")  # besides those of every recipe


def _facts(trainer: Trainer) -> dict[str, Any]:
    optimizer = layerwise(trainer.optimizer)
    rates = optimizer.layer_learning_rates() if optimizer else {}
    return {
        "train_samples": len(trainer.train_dataset),
        "eval_samples": len(trainer.eval_dataset),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "trainable_parameters": trainer.get_num_trainable_parameters(),
        "device": device_name(trainer.args.device),
        "versions": versions(*VERSIONS, *_LIBRARIES) | {"torch": torch.__version__},
        "nonfinite_steps": max((rate.nonfinite_steps for rate in rates.values()), default=0),
        "secant_rate": secant_summary(trainer.optimizer).get("secant/rate"),
    }


def _table(results: Mapping[str, Any], rates: LayerRateHistory) -> str:
    """The run in a few lines."""
    scores = [name for name in results if name.startswith("eval_") or name == "train_loss"]
    scores = [name for name in scores if isinstance(results[name], float)]
    lines = [f"{name:28}{results[name]:10.4f}" for name in scores]
    medians = {
        layer: statistics.median(x for x in values if x is not None)
        for layer, values in rates.scale.items()
    }
    if medians:
        ordered = sorted(medians, key=medians.__getitem__)
        lines += ["", f"median of S over the run, of {len(ordered)} layers:"]
        for what, at in (("lowest", 0), ("middle", len(ordered) // 2), ("highest", -1)):
            lines.append(f"  {what:10}{medians[ordered[at]]:8.3f}  {ordered[at]}")
    if results["nonfinite_steps"]:
        lines += [
            "",
            f"warning: in {results['nonfinite_steps']} of {results['step']} steps the gradient of "
            "a layer was inf or NaN, and it was not trained; is the learning rate too large?",
        ]
    return "\n".join(lines)


def check_pretrained(option: str, name: str | None, training: RecipeArguments) -> None:
    """Raises UsageError if the option's value is neither a folder nor may be an id of the Hub, or
    is a folder whose files the run would replace."""
    may_be_id = re.fullmatch(r"(?=.{1,96}$)\w[\w.-]*(/[\w.-]+)?", name or "x")
    if name and not os.path.isdir(name) and not may_be_id:
        raise UsageError(f"--{option}: there is no folder {shortened(name)}")
    folder = Path(str(training.output_dir)).resolve()
    place = Path(name or "").resolve()
    if name and (place == folder or any(map(place.is_relative_to, _own_files(folder)))):
        raise UsageError(
            f"--{option} {name} is in the --output_dir, whose files the run replaces; choose "
            "another --output_dir"
        )


def exit_status(recipe: str, main: Callable[[Sequence[str]], Any], argv: Sequence[str]) -> int:
    """Runs a recipe's `main(argv)`.

    Returns:
        0 when the run is finished, 1 if its loss is not finite, it was not published as asked or
        there was no room for what it writes, 2 for bad options or data (one line on stderr says
        what), 130 when the user stopped it.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        main(argv)
    except (UsageError, DataError) as error:
        if first:
            print(f"{recipe}: error: {error}", file=sys.stderr)
        return 2
    except SaveError as error:  # of any process
        print(f"{recipe}: error: {error}; {NOT_SAVED}", file=sys.stderr)
        return 1
    except DivergedError as error:
        if first:
            print(f"{recipe}: {error}", file=sys.stderr)
        return 1
    except hub.PublishError as error:  # of the main process, which alone publishes
        print(error, file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt) as stop:
        if first:
            print(f"{recipe}: {stop or 'stopped, nothing saved'}", file=sys.stderr)
        return INTERRUPTED
    return 0
