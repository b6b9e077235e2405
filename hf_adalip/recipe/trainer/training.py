"""A recipe's run with Trainer: resumed, stopped by Ctrl-C, and written down."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from transformers import Trainer, TrainerCallback, TrainingArguments

from ...diagnose.checks import diverged
from ...errors import DataError, DivergedError, Interrupted, SaveError, UsageError
from ...files import MANIFEST, saving, whole
from ...monitor import RATES, RECORDS, LayerRateHistory, layerwise
from ...publish import hub
from ...publish.script import SCRIPT, running_script
from ..checkpoints import STAGED, replacing, write_manifest
from ..data import on_hub
from ..run import (
    INTERRUPTED,
    NOT_SAVED,
    any_asked_to_stop,
    asked_to_stop,
    check_same_run,
    load_rates,
    make_folder,
    write_results,
)
from .arguments import RecipeArguments, registered
from .files import clean
from .results import best_step, evaluated, facts, scores, table


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
        clean(folder, checkpoint, args.overwrite_output_dir)
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
        print(f"\n{table(results, watch.rates)}\n\nresults in {folder}")
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
    best = None if watch.stopped else best_step(trainer)
    if not watch.stopped:
        # on all processes: where the model is sharded, each has a part of it; and before it is
        # evaluated, for which bf16_full_eval and fp16_full_eval round its weights
        readme = folder.parent / "README.md"
        if args.should_save and readme.exists() and hasattr(trainer.model, "peft_config"):
            shutil.copy(readme, folder)  # peft writes into the one that is there
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
        **facts(trainer),
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
