"""A recipe's run with Trainer: resumed, stopped by Ctrl-C, and written down."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ...diagnose.checks import diverged
from ...errors import DataError, DivergedError, SaveError
from ...files import MANIFEST, saving
from ...integrations.trainer import attach
from ...monitor import RATES, RECORDS, LayerRateHistory, layerwise
from ...publish.script import running_script
from ..checkpoints import STAGED, replacing, write_manifest
from ..data import on_hub
from ..folder import make_folder
from ..run import (
    GO_ON,
    any_asked_to_stop,
    asked_to_stop,
    check_same_run,
    conclude,
    interrupted,
    load_rates,
    write_run,
)
from .arguments import RecipeArguments, is_ours, registered
from .files import clear
from .results import best_step, evaluated, facts_of, scores, table


class RunCallback(TrainerCallback):  # type: ignore[misc]
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
        asked = any_asked_to_stop(self, self.trainer.accelerator, step)
        if asked and step < state.max_steps:
            self.stopped = control.should_training_stop = control.should_save = True
            if args.save_strategy == SaveStrategy.BEST:  # which saves what is best, and no more
                args.save_strategy = SaveStrategy.STEPS
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

    A Trainer with one of our optimizers is attached to, unless it was already. The output folder
    gets the model, `all_results.json`, the script that ran as `train.py` and, if the optimizer has
    an S, the layers' learning rates; of `Secant` its measurements. Stopped by Ctrl-C or SIGTERM it
    saves a checkpoint at the end of the step; a second Ctrl-C does not wait.

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
    if is_ours(args) and getattr(trainer, "_hf_adalip", None) is None:
        attach(trainer)
    watch = RunCallback(trainer, same)
    if checkpoint:
        saved = json.loads(Path(checkpoint, MANIFEST).read_text())["settings"]
        check_same_run(Path(checkpoint), saved, same)
        watch.rates = load_rates(Path(checkpoint))
    if args.should_save:
        make_folder(folder)
        clear(folder, checkpoint, args.overwrite_output_dir)
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
        step = trainer.state.global_step
        on = (
            "with --save_only_model, no run can go on from there" if args.save_only_model else GO_ON
        )
        raise interrupted(step, trainer.state.max_steps, folder / f"checkpoint-{step}", on)
    losses = [results[name] for name in ("train_loss", "eval_loss") if name in results]
    bad = [loss for loss in losses if not math.isfinite(loss)]
    ended = diverged(bad[0], "loss of the finished run", None) if bad else None
    if args.should_save:
        conclude(
            settings["recipe"],
            folder,
            table(results, watch.rates),
            ended,
            finite=not bad,
            repo_id=args.publish_to,
            private=bool(args.hub_private_repo),
        )
    elif bad:
        raise DivergedError(str(ended))
    return results


def _finish(
    trainer: Trainer,
    watch: RunCallback,
    settings: Mapping[str, Any],
    script: str | None,
    seconds: float,
    folder: Path,
) -> dict[str, Any]:
    """Evaluates, and writes model and results into a folder; returns the results."""
    args = cast("RecipeArguments", trainer.args)
    checkpoint = args.resume_from_checkpoint
    epochs = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    best = None if watch.stopped else best_step(trainer)
    if not watch.stopped:
        # on all processes: where the model is sharded, each has a part of it; and before it is
        # evaluated, for which bf16_full_eval and fp16_full_eval round its weights
        readme = folder.parent / "README.md"
        if args.should_save and readme.exists() and hasattr(trainer.model, "peft_config"):
            shutil.copy(readme, folder)  # peft writes into the one that is there
        if callable(averaged := getattr(trainer.optimizer, "eval", None)):
            averaged()  # of schedule-free ones: to the weights that are evaluated
        trainer.save_model(str(folder))
    if not watch.stopped and not evaluated(trainer, best):
        trainer.evaluate()
        if best is None:
            epochs.append(trainer.state.log_history[-1])
    results = {
        **scores(trainer.state.log_history),
        **({} if best is None else {"best_step": best}),
        "finished": not watch.stopped,
        "epoch": trainer.state.epoch,
        "step": trainer.state.global_step,
        **settings,
        "on_hub": on_hub(settings["dataset_name"], settings.get("model_name_or_path")),
        **facts_of(trainer),
        "resumed_from": checkpoint,
        "seconds_since_then" if checkpoint else "seconds": seconds,
        "command": args.command,
        "epochs": epochs,
    }
    if args.should_save:
        write_run(folder, results, watch.rates, script, trainer.optimizer)
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
        "optimizer": registered(args) or args.optim.value,
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
