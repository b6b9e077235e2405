"""The training loop of the image recipes.

What makes a resumed run equal to one that was never stopped: the order of the samples, and what
augmentation draws for each, are functions of (seed, epoch); a checkpoint holds everything else
that changes; and it gets its name only when it is whole, with the sha256 of each of its files.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import MultiProcessAdapter
from accelerate.utils import DistributedType, set_seed
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from tqdm.contrib.logging import logging_redirect_tqdm  # type: ignore[import-untyped]

from ...errors import SaveError, UsageError
from ...files import PARTIAL, saving, whole
from ...integrations.secant import gradients_reduced
from ...monitor import (
    NORMS,
    RATES,
    RECORDS,
    LayerRateHistory,
    NormHistory,
    layerwise,
    secant,
    secant_summary,
    summary,
)
from ...publish.script import running_script
from ...registry import create_optimizer
from ..checkpoints import check_contents, put_in_place, replacing, write_manifest
from ..data import on_hub
from ..run import (
    any_asked_to_stop,
    asked_to_stop,
    check_same_run,
    facts,
    interrupted,
    load_rates,
    nonfinite_steps,
    write_run,
)
from .batches import EpochSampler, augmentation, batches_left, make_loader, share_of_step
from .data import ImageData
from .engines import WHOLE_ON_EVERY_PROCESS, cast_around, engine_name
from .normalisation import check_batches, share_buffers, train_mode
from .options import Recipe, TrainingArguments, scheduler_factory
from .results import METRICS, scores


class _OfMainProcess(MultiProcessAdapter):  # type: ignore[misc]
    """Without accelerate's `[RANK 0]`, which is no news where only the main process speaks."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        return msg, kwargs


logger = _OfMainProcess(logging.getLogger(__name__), {})

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass
class Progress:
    """How far a run is; what accelerate saves and loads beside model, optimizer and RNG states."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done
    batch: int = 0  # batches done in the epoch after those
    seconds: float = 0.0  # of training and evaluation, in all sessions
    totals: list[list[float]] = field(default_factory=list)  # of each process, see Training
    epochs: list[dict[str, Any]] = field(default_factory=list)  # what each epoch came to

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class Training:
    """One run.

    Args:
        args: what the user asked for.
        recipe: the network and its name.
        arguments: of the optimizer, from `optimizer_arguments`.
        data: what to train and evaluate on.
        accelerator: where to; from `make_accelerator`.
        folder: where the run writes.
        command: the command line, for the results.

    Raises:
        UsageError: if network or optimizer cannot be made for these images.
    """

    def __init__(
        self,
        args: TrainingArguments,
        recipe: Recipe,
        arguments: Mapping[str, Any],
        data: ImageData,
        accelerator: Accelerator,
        folder: Path,
        command: str = "",
    ) -> None:
        self.args, self.data = args, data
        self.accelerator, self.folder, self.command = accelerator, folder, command
        self.script = running_script()
        set_seed(args.seed)
        try:
            if recipe.configure is not None:
                recipe = recipe.configure(recipe, args, data.num_classes)
            model = recipe.build_model(data.image_shape, data.num_classes)
            groups = recipe.parameter_groups
            params = model if groups is None else groups(model, arguments)
            optimizer = create_optimizer(params, args.optim, **arguments)
        except (ValueError, TypeError) as error:
            raise UsageError(str(error)) from error
        check_batches(model, data, args, accelerator.num_processes)
        self.recipe = recipe
        self.parameters = sum(p.numel() for p in model.parameters())  # ZeRO-3 leaves none
        self.average = self._average(model)
        set_seed(args.seed, device_specific=True)  # what a process draws from here on is its own
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            cast_around(model)
        self.sampler = EpochSampler(len(data.train), args.seed)
        loader = make_loader(data.train, args.per_device_train_batch_size, self.sampler)
        eval_loader = make_loader(data.test, args.per_device_eval_batch_size)
        self.model, self.optimizer, self.loader, self.eval_loader = accelerator.prepare(
            model, optimizer, loader, eval_loader
        )
        self.steps_per_epoch = math.ceil(len(self.loader) / accelerator.gradient_accumulation_steps)
        epochs = args.num_train_epochs
        self.total_steps = args.max_train_steps or epochs * self.steps_per_epoch
        self.record_every = math.ceil(self.total_steps / RECORDS)
        self.settings = self._settings(arguments)  # before a scheduler changes the learning rate
        self.scheduler = _scheduler(args, optimizer, self.total_steps)
        self.progress, self.rates = Progress(), LayerRateHistory()
        self.norms = self._norms(model, optimizer)
        accelerator.register_for_checkpointing(self.progress)
        if self.average is not None:
            accelerator.register_for_checkpointing(self.average)
        if self.scheduler is not None:
            accelerator.register_for_checkpointing(self.scheduler)
        wide = torch.float32 if accelerator.device.type == "mps" else torch.float64
        # loss, correct answers and images of this epoch so far, summed over this process's batches
        self.totals = torch.zeros(3, dtype=wide, device=accelerator.device)
        self.stop_asked = False
        self.saved_last = 0, folder  # step and path
        self.nonfinite_steps = 0  # as of the last results, when there is still a process group

    def _average(self, model: nn.Module) -> Any:
        """The recipe's moving average of a model that accelerate has not prepared yet.

        (Of a prepared one, a copy for mixed precision would run the original's forward.)
        """
        if self.recipe.average is None:
            return None
        kind = self.accelerator.distributed_type
        if kind not in WHOLE_ON_EVERY_PROCESS:
            raise UsageError(
                f"no moving average of the weights can be kept under {kind.value}, which spreads "
                "them over the processes; leave it out"
            )
        return self.recipe.average(model.to(self.accelerator.device))

    def _norms(self, model: nn.Module, optimizer: Optimizer) -> NormHistory | None:
        if self.args.record != "norms":
            return None
        kind = self.accelerator.distributed_type
        if kind not in WHOLE_ON_EVERY_PROCESS:
            raise UsageError(
                f"--record norms: {kind.value} spreads the weights over the processes; leave it out"
            )
        return NormHistory(model, optimizer, self.total_steps)

    def _settings(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What a run and the one that it resumes must have in common."""
        accelerator, args = self.accelerator, self.args
        shared = {entry.name for entry in dataclasses.fields(TrainingArguments)}
        own = {name: value for name, value in vars(args).items() if name not in shared}
        return {
            "recipe": self.recipe.name,
            **own,
            "optimizer": args.optim.lower(),
            "optimizer_arguments": json.loads(json.dumps(arguments)),
            "learning_rate": self._learning_rate(),
            "weight_decay": args.weight_decay,
            "lr_scheduler_type": args.lr_scheduler_type,
            # a constant rate can be gone on with for longer; a schedule has one length
            "scheduled_steps": None if args.lr_scheduler_type == "constant" else self.total_steps,
            "num_warmup_steps": args.num_warmup_steps,
            "max_grad_norm": args.max_grad_norm,
            "seed": args.seed,
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
            "num_processes": accelerator.num_processes,
            "engine": engine_name(accelerator),
            "mixed_precision": accelerator.mixed_precision,
            "dataset_fingerprint": self.data.fingerprint(),
            "augmentation": None if self.recipe.augment is None else repr(self.recipe.augment),
        }

    @property
    def done(self) -> bool:
        return self.progress.step >= self.total_steps

    def run(self) -> dict[str, Any]:
        """Trains to the end; returns the results, which are in the folder too (main process).

        Raises:
            Interrupted: if the user stopped it; the run has been saved then.
        """
        started = time.perf_counter() - self.progress.seconds
        with asked_to_stop(self), logging_redirect_tqdm():
            self.bar = tqdm(
                total=self.total_steps,
                initial=self.progress.step,
                unit="step",
                smoothing=0.0,  # the mean so far, with evaluation in it: the honest estimate
                mininterval=0.1 if sys.stderr.isatty() else 30.0,
                disable=not self.accelerator.is_local_main_process,
            )
            with self.bar:
                if self.done and self._epoch_left_open():
                    self._end_epoch(started)
                while not self.done:
                    self._train_epoch(started)
                    self._end_epoch(started)
        return self._write_results(finished=True)

    def _epoch_left_open(self) -> bool:
        """Whether the run was saved after the last batch and before what comes after it."""
        progress = self.progress
        evaluated = progress.epochs[-1]["step"] if progress.epochs else 0
        return progress.batch > 0 and evaluated != progress.step

    def _train_epoch(self, started: float) -> None:
        accelerator, progress = self.accelerator, self.progress
        self.sampler.epoch = progress.epoch
        size, images = self.args.per_device_train_batch_size, len(self.data.train)
        drawn = self.args.seed, progress.epoch, images, accelerator.device
        augment = augmentation(self.recipe.augment, *drawn)
        train_mode(self.model)
        self.optimizer.train()  # for schedule-free ones, whose weights differ in evaluation
        for batch in batches_left(self.loader, progress.batch, accelerator):
            with accelerator.accumulate(self.model):
                labels = batch["labels"]
                pixels, targets = augment(batch)
                own, share = share_of_step(len(labels), progress.batch, size, images, accelerator)
                logits, losses = self._gradients(pixels, targets, own, share)
                if accelerator.sync_gradients and self.args.max_grad_norm is not None:
                    accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses, correct = losses.detach()[:own], (logits.argmax(-1) == labels)[:own].sum()
            sums = [losses.sum(), correct, correct.new_tensor(own)]
            self.totals += torch.stack([x.to(self.totals.dtype) for x in sums])
            progress.batch += 1
            if accelerator.sync_gradients:
                self._after_step(losses.mean(), started)
                if self.done:
                    break

    def _gradients(
        self, images: Tensor, targets: Tensor, own: int, share: float
    ) -> tuple[Tensor, Tensor]:
        """Computes a batch's gradients; its logits, and the loss of each image."""
        found: tuple[Tensor, Tensor] | None = None

        def closure() -> Tensor:
            nonlocal found
            logits = self.model(images)
            losses = F.cross_entropy(logits.float(), targets, reduction="none")
            loss = losses[:own].sum() * share
            self.accelerator.backward(loss)
            found = logits, losses
            return loss.detach()

        measures = secant(self.optimizer)
        if measures is None or not measures.due:
            closure()
        else:  # calls it more than once
            with gradients_reduced(self.accelerator, self.model):
                measures.compute_gradients(closure, self.accelerator.gradient_accumulation_steps)
        assert found is not None
        return found

    def _after_step(self, loss: Tensor, started: float) -> None:
        progress = self.progress
        progress.step += 1
        if self.scheduler is not None and not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        if self.average is not None:
            # accelerate would take DDP out of a compiled model that it keeps compiled
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            self.average.update(model, step=progress.step)
        self.bar.update()
        if progress.step == 1 or progress.step % self.record_every == 0:
            self._record(loss)
        progress.seconds = time.perf_counter() - started
        every = self.args.checkpointing_steps
        if every and every != "epoch" and progress.step % int(every) == 0:
            self.save(f"step_{progress.step}")
        if not self.done and any_asked_to_stop(self, self.accelerator, progress.step):
            self._stop()

    def _record(self, loss: Tensor) -> None:
        """What needs a copy from the device: the loss and the layers' learning rates."""
        if not self.accelerator.is_main_process:
            return
        step, optimizer = self.progress.step, layerwise(self.optimizer)
        found = optimizer.layer_learning_rates() if optimizer else {}
        if found:
            self.rates.record(step, found)
        values = {"train_batch_loss": loss.item(), "learning_rate": self._learning_rate()}
        self.bar.set_postfix(loss=f"{values['train_batch_loss']:.4f}", refresh=False)
        values |= secant_summary(self.optimizer) | summary(found)
        self.accelerator.log(values, step=step)

    def _learning_rate(self) -> float:
        """The largest of the groups', which is what was asked for where layers have less."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def _end_epoch(self, started: float) -> None:
        """Evaluates, and writes down what the epoch, or the part of it that was run, came to."""
        progress = self.progress
        loss, correct, count = self.accelerator.reduce(self.totals, reduction="sum").tolist()
        entry = {
            "epoch": progress.epoch + progress.batch / len(self.loader),
            "step": progress.step,
            "train_loss": loss / count,
            "train_accuracy": correct / count,
            **self.evaluate(),
        }
        progress.seconds = time.perf_counter() - started
        entry["seconds"] = progress.seconds
        progress.epochs.append(entry)
        if progress.batch == len(self.loader):
            progress.epoch, progress.batch = progress.epoch + 1, 0
            self.totals.zero_()
        self.accelerator.log(entry, step=progress.step)
        if self.accelerator.is_main_process:
            shown = [f"{name} {entry[name]:.4f}" for name in METRICS]
            logger.info(f"epoch {entry['epoch']:g}: {', '.join(shown)} ({progress.seconds:.0f} s)")
        if self.args.checkpointing_steps == "epoch" and not progress.batch:
            self.save(f"epoch_{progress.epoch - 1}")
        if not self.done and any_asked_to_stop(self, self.accelerator):
            self._stop()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """eval_loss and eval_accuracy on the test set; empty but on the main process."""
        from .metrics import Accuracy  # evaluate takes long to import, also for --help

        model = self.model if self.average is None else self.average.module
        share_buffers(model)
        model.eval()
        self.optimizer.eval()
        metric, total = Accuracy(keep_in_memory=True), 0.0
        for batch in self.eval_loader:
            with self.accelerator.autocast():
                logits, labels = model(batch["pixel_values"]), batch["labels"]
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
            found = self.accelerator.gather_for_metrics((logits.argmax(-1), labels, losses))
            if self.accelerator.is_main_process:
                answers, labels, losses = (tensor.cpu() for tensor in found)
                metric.add_batch(predictions=answers, references=labels)
                total += losses.double().sum().item()
        if not self.accelerator.is_main_process:
            return {}
        accuracy = metric.compute()["accuracy"]
        return {"eval_loss": total / len(self.data.test), "eval_accuracy": accuracy}

    def _stop(self) -> None:
        step, path = self.saved_last
        if step != self.progress.step:
            path = self.save(f"step_{self.progress.step}")
        self._write_results(finished=False)
        raise interrupted(self.progress.step, self.total_steps, path)

    def save(self, name: str) -> Path:
        """Saves a checkpoint in the folder; it has its name only when it is whole.

        Raises:
            SaveError: if there is no room for it; those before are as they were then.
        """
        accelerator, path = self.accelerator, self.folder / name
        partial = path.with_name(f"{name}{PARTIAL}")
        self.progress.totals = accelerator.gather(self.totals[None]).tolist()
        share_buffers(self.model)
        try:
            with saving(path):
                if accelerator.is_main_process:
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir(parents=True)
                accelerator.wait_for_everyone()
                accelerator.save_state(str(partial))
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    self.rates.save(partial / f"{RATES}.json")
                    write_manifest(partial, self.progress.step, self.settings)
                    put_in_place(partial, path)
        except SaveError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        accelerator.wait_for_everyone()
        self.saved_last = self.progress.step, path
        return path

    def load(self, path: Path, manifest: Mapping[str, Any]) -> None:
        """Goes back to a checkpoint.

        One of DeepSpeed is read by DeepSpeed, which unpickles it and so runs what is in it: resume
        only from one that you trust.

        Raises:
            UsageError: if it was made with other settings, naming them, is from after the end of
                this run, or has a file, named, that is damaged or has more than tensors and
                numbers in it. Nothing has been loaded then.
        """
        check_same_run(path, manifest["settings"], self.settings)
        if manifest["step"] > self.total_steps:
            raise UsageError(
                f"--resume_from_checkpoint: {path} is of step {manifest['step']}, and this run "
                f"ends at step {self.total_steps}; train for longer, or choose an earlier one"
            )
        processes = range(self.accelerator.num_processes)
        states = [f"random_states_{process}.pkl" for process in processes]
        check_contents(path, [*states, f"{RATES}.json"])
        self.rates = load_rates(path)
        self.accelerator.load_state(str(path))
        mine = self.progress.totals[self.accelerator.process_index]
        self.totals.copy_(torch.tensor(mine, dtype=self.totals.dtype))
        logger.info(f"resumed from {path} at step {self.progress.step}")

    def results(self, finished: bool) -> dict[str, Any]:
        """What all_results.json has."""
        return {
            **scores(self.progress.epochs),
            "task": "image-classification",
            "finished": finished,
            "epoch": self.progress.epoch + self.progress.batch / len(self.loader),
            "step": self.progress.step,
            **self.settings,
            "per_device_eval_batch_size": self.args.per_device_eval_batch_size,
            "dataset_name": self.data.name,
            "on_hub": on_hub(self.data.name),
            "eval_split": self.data.eval_split,
            "max_train_samples": self.args.max_train_samples,
            "max_eval_samples": self.args.max_eval_samples,
            "train_samples": len(self.data.train),
            "eval_samples": len(self.data.test),
            "parameters": self.parameters,
            **facts(self.accelerator.device, *self.recipe.libraries),
            "nonfinite_steps": self.nonfinite_steps,
            "secant_rate": secant_summary(self.optimizer).get("secant/rate"),
            "seconds": self.progress.seconds,
            "command": self.command,
            "epochs": self.progress.epochs,
        }

    def _write_results(self, finished: bool) -> dict[str, Any]:
        self.nonfinite_steps = nonfinite_steps(self.optimizer)
        results = self.results(finished) if self.accelerator.is_main_process else {}
        model = getattr(self.model, "_orig_mod", self.model)  # torch.compile would rename weights
        # asked of all processes: where the model is sharded, each has a part of it
        state = self.accelerator.get_state_dict(model) if finished else {}
        if results:
            model = self.accelerator.unwrap_model(model)
            if self.average is not None:
                model = self.average.module
                state = model.state_dict()
            with replacing(self.folder) as folder:
                if finished:
                    weights = {name: x.detach().cpu().clone() for name, x in state.items()}
                    whole(folder / WEIGHTS, lambda path: save_file(weights, path))
                    if isinstance(config := getattr(model, "config", None), dict):
                        text = json.dumps(config, indent=2)
                        whole(folder / CONFIG, lambda path: path.write_text(text + "\n"))
                if self.norms is not None:
                    self.norms.save(folder / NORMS)
                write_run(folder, results, self.rates, self.script, self.optimizer)
        self.accelerator.wait_for_everyone()
        return results


def _scheduler(args: TrainingArguments, optimizer: Optimizer, total_steps: int) -> Any:
    """A schedule in optimizer steps, or None for a constant learning rate.

    Raises:
        UsageError: if it would be warming up to the end.
    """
    if args.lr_scheduler_type == "constant":
        return None
    if args.num_warmup_steps >= total_steps:
        raise UsageError(
            f"--num_warmup_steps {args.num_warmup_steps} is not less than the {total_steps} steps "
            "of the run; give fewer, or train for longer"
        )
    return scheduler_factory()(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.num_warmup_steps,
        num_training_steps=total_steps,
    )
