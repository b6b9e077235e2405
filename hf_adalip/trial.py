"""Runs a script for a few steps, and says what is wrong with its training."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .doctor import Finding, Watch, WrongOptimizerError, examine, examine_run, refused_by_fsdp
from .monitor import layerwise
from .optim.layerwise import LayerwiseOptimizer
from .run import run_script

if TYPE_CHECKING:
    from transformers import Trainer

STEPS = 20
"""Of the optimizer, after which the script is stopped."""


class Reached(BaseException):
    """Ends the script; not an Exception, which it may catch."""


class Trial:
    """What is found while a script runs."""

    def __init__(self) -> None:
        self.findings: list[Finding | str] = []
        self.watch = Watch()
        self.steps, self.all_steps = 0, 0  # of our optimizers, and of any
        self.stepped_last = ""  # the name of its class

    def stepped(self, optimizer: Optimizer, *_: Any) -> None:
        self.all_steps += 1
        self.stepped_last = type(optimizer).__name__
        if not self.steps and self.all_steps > STEPS + 1:  # the base of one of ours steps before it
            raise Reached
        if isinstance(optimizer, LayerwiseOptimizer):
            self.steps += 1
            self.watch.layers(optimizer, optimizer.layer_learning_rates())
            if self.steps >= STEPS:
                raise Reached

    def clipping(self, clip: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def watched(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> torch.Tensor:
            norm = clip(parameters, max_norm, *args, **kwargs)
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            self.watch.clip(float(whole), float(max_norm))
            return norm

        return watched

    def training(self, train: Callable[..., Any]) -> Callable[..., Any]:
        """Trainer.train that leaves nothing behind, resumes nothing, and ends early."""

        def watched(trainer: Trainer, *_: Any, **__: Any) -> None:
            from transformers import DefaultFlowCallback

            self.findings += examine(trainer)
            if self.findings:
                raise Reached
            trainer.args.save_strategy = trainer.args.eval_strategy = "no"
            trainer.args.load_best_model_at_end = False
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
                found = layerwise(kwargs.get("optimizer"))
                if found is not None:
                    scheduler = kwargs.get("lr_scheduler")
                    trial.findings += examine_run(trainer, found, scheduler, state.max_steps)

        return Start()


@contextmanager
def _watched_by(trial: Trial) -> Iterator[None]:
    from transformers import Trainer

    places = [(torch.nn.utils, "clip_grad_norm_"), (torch.nn.utils.clip_grad, "clip_grad_norm_")]
    before = [getattr(*place) for place in places]
    train = Trainer.train
    hook = register_optimizer_step_post_hook(trial.stepped)
    try:
        for place, clip in zip(places, before, strict=True):
            setattr(*place, trial.clipping(clip))
        Trainer.train = trial.training(train)
        yield
    finally:
        hook.remove()
        Trainer.train = train
        for place, clip in zip(places, before, strict=True):
            setattr(*place, clip)


def _refused(error: Exception) -> bool:
    """Whether it was raised by an optimizer of ours."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).parent == Path(__file__).parent / "optim"


def doctor(script: str, arguments: list[str]) -> int:
    """Runs a script for the first STEPS steps of its optimizer, and prints what is wrong.

    The script may use transformers' Trainer, of which no checkpoints, evaluations and trackers are
    left, or any loop.

    Returns:
        0 for nothing, 1 for something, 2 if the script ended without a step of an optimizer with a
        learning rate per layer.
    """
    trial = Trial()
    try:
        with _watched_by(trial):
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
    findings = [*trial.findings, *(trial.watch.findings() if trial.steps else ())]
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
        print(f"{count} wrong (watched for {trial.steps} steps)")
    return int(bool(findings))
