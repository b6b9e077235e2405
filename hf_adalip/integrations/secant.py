"""`Secant` in transformers.Trainer, which steps an optimizer without a closure, and accelerate."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..monitor import secant
from ..optim import Secant

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import Trainer


def measure_training_steps(trainer: Trainer) -> None:
    """Lets a `Secant` measure where Trainer computes gradients.

    `trainer.training_step` is wrapped, on this trainer alone, and nothing else is touched. Where
    the optimizer is due, the training step of the first micro-batch is called once more (in the
    first step of all some ten times), by `Secant.compute_gradients`: with the same inputs and the
    same `num_items_in_batch`, through the same overrides of `training_step` and `compute_loss`,
    label smoothing and autocast, and with the same random numbers. What Trainer then clips,
    accumulates on and steps with are the gradients of the last call, as always.
    """
    training_step = trainer.training_step

    def measured_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = secant(trainer.optimizer)
        if optimizer is None or not optimizer.due:
            return training_step(model, inputs, *args, **kwargs)

        def closure() -> Any:
            model.zero_grad()  # also of what the optimizer does not have
            return training_step(model, copy.copy(inputs), *args, **kwargs)

        with gradients_reduced(trainer.accelerator, model):
            return optimizer.compute_gradients(closure, trainer.current_gradient_accumulation_steps)

    trainer.training_step = measured_step


@contextmanager
def gradients_reduced(accelerator: Accelerator, model: Any) -> Iterator[None]:
    """FSDP2 keeps gradients back while accumulating; not those that are measured."""
    from torch.distributed.fsdp import FSDPModule

    model = accelerator.unwrap_model(model)
    kept_back = isinstance(model, FSDPModule) and not accelerator.sync_gradients
    if kept_back:
        model.set_requires_gradient_sync(True)
    try:
        yield
    finally:
        if kept_back:
            model.set_requires_gradient_sync(False)


def refuse_trainer(trainer: Trainer, optimizer: Secant) -> None:
    """Raises RuntimeError for what a `Secant` cannot train under, before the first step."""
    if trainer.is_deepspeed_enabled:
        raise RuntimeError(
            f"Trainer trains with {type(optimizer).__name__} under DeepSpeed, whose engine keeps "
            "the gradients and takes the steps itself: use DDP, or FSDP2 (fsdp_version: 2)"
        )
    if getattr(trainer.accelerator, "scaler", None) is not None:
        raise RuntimeError(
            "fp16=True scales the loss by a number that changes, and Secant cannot measure that: "
            "use bf16=True"
        )
