"""Runs a script for a few steps, and says what is wrong with its training."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..as_main import run_script
from ..monitor import layerwise, secant
from ..optim import LayerwiseOptimizer, Secant
from ..optim.secant.optimizer import NUMBERS
from .checks import (
    TRIAL,
    Finding,
    Watch,
    WrongOptimizerError,
    examine,
    examine_run,
    examine_secant,
    refused_by_fsdp,
)

if TYPE_CHECKING:
    from transformers import Trainer

STEPS = 20
"""Of the optimizer, after which the script is stopped."""


class Reached(BaseException):
    """Ends the script; not an Exception, which it may catch."""


class Trial:
    """What is found while a script runs."""

    def __init__(self, folder: str) -> None:
        self.folder = folder  # for what recipes and Trainers write
        self.findings: list[Finding | str] = []
        self.watch = Watch()
        self.steps, self.all_steps = 0, 0  # of our optimizers, and of any
        self.stepped_last = ""  # the name of its class

    def stepped(self, optimizer: Optimizer, *_: Any) -> None:
        ours = isinstance(optimizer, (LayerwiseOptimizer, Secant))
        if not ours and NUMBERS[0] in optimizer.param_groups[0]:
            return  # the base of a Secant, whose first step takes many of them
        self.all_steps += 1
        self.stepped_last = type(optimizer).__name__
        if not ours and not self.steps and self.all_steps > STEPS:
            raise Reached
        if isinstance(optimizer, LayerwiseOptimizer):
            self.steps += 1
            self.watch.layers(optimizer, optimizer.layer_learning_rates())
        if isinstance(optimizer, Secant):
            self.steps += 1
            self.watch.measured(optimizer)
        if self.steps >= STEPS:
            raise Reached

    def clipped(self) -> str:
        """What is said of clipping, where there was any, right or wrong."""
        seen = self.watch.clipping
        if not seen.clipped:
            return ""
        return f"; {seen.clipped} of {seen.steps} gradients were clipped to {self.watch.clipped_to}"

    def measured(self) -> str:
        """What is said of a `Secant`, right or wrong."""
        if (found := self.watch.secant) is None:
            return ""
        last = f", the last with r = {found.probes[-1].r:.3g}" if found.probes else ""
        count = f"{len(found.probes)} measurement{'s' * (len(found.probes) != 1)}"
        return f"; a rate of {found.rate:.3g} was found after {count}{last}"

    def clipping(self, clip: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """clip_grad_norm_ that is watched."""

        def watched(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> torch.Tensor:
            norm = clip(parameters, max_norm, *args, **kwargs)
            self.watch.clip(_whole(norm), float(max_norm))
            return norm

        return watched

    def clipping_with_norm(self, clip: Callable[..., None]) -> Callable[..., None]:
        """clip_grads_with_norm_ that is watched."""

        def watched(
            parameters: Any, max_norm: float, total_norm: Any, *args: Any, **kwargs: Any
        ) -> None:
            self.watch.clip(_whole(total_norm), float(max_norm))
            clip(parameters, max_norm, total_norm, *args, **kwargs)

        return watched

    def clipping_values(self, clip: Callable[..., None]) -> Callable[..., None]:
        """clip_grad_value_ that is watched."""

        def watched(parameters: Any, clip_value: float, *args: Any, **kwargs: Any) -> None:
            params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
            before = _norm_of_gradients(params)
            clip(params, clip_value, *args, **kwargs)
            self.watch.clip(before, _norm_of_gradients(params), f"values of {clip_value:g}")

        return watched

    def arguments(self, post_init: Callable[[Any], None]) -> Callable[[Any], None]:
        """TrainingArguments.__post_init__, for a folder that is removed."""

        def elsewhere(given: Any) -> None:
            given.output_dir, given.push_to_hub = self.folder, False
            post_init(given)

        return elsewhere

    def training(self, train: Callable[..., Any]) -> Callable[..., Any]:
        """Trainer.train that leaves nothing behind, resumes nothing, and ends early."""

        def watched(trainer: Trainer, *_: Any, **__: Any) -> None:
            from transformers import DefaultFlowCallback

            self.findings += examine(trainer)
            if self.findings:
                raise Reached
            trainer.args.save_strategy = trainer.args.eval_strategy = "no"
            trainer.args.load_best_model_at_end = trainer.args.eval_on_start = False
            callbacks = trainer.callback_handler
            callbacks.callbacks = [
                x for x in callbacks.callbacks if isinstance(x, DefaultFlowCallback)
            ]
            trainer.add_callback(self._start(trainer))
            train(trainer)
            raise Reached

        return watched

    def _start(self, trainer: Trainer) -> Any:
        from transformers import TrainerCallback

        trial = self

        class Start(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                optimizer, scheduler = kwargs.get("optimizer"), kwargs.get("lr_scheduler")
                if (found := layerwise(optimizer)) is not None:
                    trial.findings += examine_run(trainer, found, scheduler, state.max_steps)
                elif (finding := secant(optimizer)) is not None:
                    trial.findings += examine_secant(trainer, finding, scheduler, state.max_steps)

        return Start()


@contextmanager
def _watched_by(trial: Trial, register: Callable[[], None]) -> Iterator[None]:
    utils = torch.nn.utils
    replaced: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (utils, "clip_grads_with_norm_", trial.clipping_with_norm),
        *((place, "clip_grad_norm_", trial.clipping) for place in (utils, utils.clip_grad)),
        *((place, "clip_grad_value_", trial.clipping_values) for place in (utils, utils.clip_grad)),
    ]
    with suppress(ImportError):  # a loop of its own needs no transformers
        from transformers import Trainer, TrainingArguments

        replaced.append((Trainer, "train", trial.training))
        replaced.append((TrainingArguments, "__post_init__", trial.arguments))
        register()  # last: it refuses a transformers that it does not know
    before = [getattr(place, name) for place, name, _ in replaced]
    hook = register_optimizer_step_post_hook(trial.stepped)
    os.environ[TRIAL] = trial.folder
    try:
        for (place, name, watched), original in zip(replaced, before, strict=True):
            setattr(place, name, watched(original))
        yield
    finally:
        del os.environ[TRIAL]
        hook.remove()
        for (place, name, _), original in zip(replaced, before, strict=True):
            setattr(place, name, original)


def _norm_of_gradients(params: list[torch.Tensor]) -> torch.Tensor:
    return _whole(torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]))


def _whole(norm: Any) -> torch.Tensor:
    return norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)


def _refused(error: Exception) -> bool:
    """Whether it was raised by an optimizer of ours."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parents[1] / "optim")


def doctor(script: str, arguments: list[str], register: Callable[[], None]) -> int:
    """Runs a script for the first STEPS steps of its optimizer, and prints what is wrong.

    The script may be a recipe or use transformers' Trainer, which then write to a folder that is
    removed, without checkpoints, evaluations and trackers; or any loop, which runs as it is.

    Args:
        script: its path.
        arguments: what it is called with.
        register: makes our names known to transformers, if that is there.

    Returns:
        0 for nothing, 1 for something, 2 if the script ended without a step of an optimizer with a
        learning rate per layer, or of `Secant`.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return _doctor(Trial(folder), script, arguments, register)


def _doctor(trial: Trial, script: str, arguments: list[str], register: Callable[[], None]) -> int:
    try:
        with _watched_by(trial, register):
            run_script(script, arguments)
    except Reached:
        pass
    except SystemExit as end:
        if end.code and not trial.steps:
            raise
    except WrongOptimizerError as wrong:  # from `attach` in the script
        trial.findings.append(wrong.finding)
    except (RuntimeError, ValueError) as error:
        finding = refused_by_fsdp(error) or (str(error) if _refused(error) else None)
        if finding is None:
            raise
        trial.findings.append(finding)
    told = {finding.why for finding in trial.findings if isinstance(finding, Finding)}
    seen = trial.watch.findings() if trial.steps else ()
    findings = [*trial.findings, *(finding for finding in seen if finding.why not in told)]
    if not trial.steps and not findings:
        instead = f"{trial.stepped_last} took some, and has" if trial.all_steps else "there is"
        print(
            f"{script}: no step of an optimizer with a learning rate per layer was seen; "
            f"{instead} none",
            file=sys.stderr,
        )
        return 2
    if os.environ.get("RANK", "0") == "0":
        for found in findings:
            print(f"- {found}")
        count = {0: "nothing", 1: "1 thing"}.get(len(findings), f"{len(findings)} things")
        print(f"{count} wrong (watched for {trial.steps} steps{trial.clipped()}{trial.measured()})")
    return int(bool(findings))
