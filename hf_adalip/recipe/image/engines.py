"""The accelerator of a recipe: the engine that its configuration asks for, or an error."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...registry import SECANT_PREFIX
from .options import TrainingArguments, trackers

try:
    from accelerate import Accelerator
    from accelerate.utils import (
        DistributedType,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
    )
except ImportError as error:
    raise ImportError(
        "hf_adalip.recipe.image.engines needs accelerate: pip install 'hf-adalip[recipes]'"
    ) from error

WHOLE_ON_EVERY_PROCESS = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
)


def make_accelerator(args: TrainingArguments, folder: Path) -> Accelerator:
    """The accelerator of a run.

    Raises:
        UsageError: if the device cannot do the mixed precision, or accelerate would not train with
            the engine that its configuration asks for, or not as the options say.
    """
    deepspeed = _asked_for("DEEPSPEED")
    if deepspeed and args.cpu:
        raise UsageError(
            "--cpu: accelerate would leave out the DeepSpeed of its configuration; leave out --cpu "
            "(where there is no GPU, DeepSpeed is on the CPU by itself)"
        )
    gloo = deepspeed and not torch.accelerator.is_available()
    try:
        accelerator = Accelerator(
            # without it, accelerate makes no process group where there is no GPU
            cpu=args.cpu or not (deepspeed or torch.accelerator.is_available()),
            mixed_precision=args.mixed_precision,
            # a plugin, because `accelerate launch` sets an environment variable that beats a number
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=args.gradient_accumulation_steps
            ),
            log_with=trackers(args) or None,
            project_dir=str(folder),
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if gloo else None,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    check_engine(accelerator, args)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        of = "" if args.mixed_precision else ", of accelerate's configuration,"
        raise UsageError(
            f"--mixed_precision fp16{of} needs a GPU, accelerate would ignore it here; give bf16 "
            "or no"
        )
    return accelerator


def _asked_for(engine: str) -> bool:
    """Whether `accelerate launch` was given a configuration with an engine."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def check_engine(accelerator: Accelerator, args: TrainingArguments) -> None:
    """Where accelerate would go on with something else than it was asked for, without a word."""
    found = accelerator.distributed_type
    if args.optim.lower().startswith(SECANT_PREFIX):
        _check_secant(accelerator, args)
    if _asked_for("FSDP") and found != DistributedType.FSDP:
        raise UsageError(
            f"accelerate's configuration has FSDP, but it would train with {found.value}: it has "
            "FSDP on GPUs only; without one, start the recipe with multi_gpu.yaml"
        )
    if found != DistributedType.DEEPSPEED:
        return
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    steps = config["gradient_accumulation_steps"]
    if steps not in ("auto", args.gradient_accumulation_steps):
        raise UsageError(
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps} would lose to the "
            f"{steps} of DeepSpeed's configuration; give the same, or auto there"
        )
    clip = config.get("gradient_clipping", 0.0)
    if clip == "auto":  # of which accelerate makes 1.0
        config["gradient_clipping"] = args.max_grad_norm or 0.0
    elif args.max_grad_norm not in (None, clip):
        raise UsageError(
            f"--max_grad_norm {args.max_grad_norm:g} would lose to the gradient_clipping {clip} of "
            "DeepSpeed's configuration; give the same, or auto there"
        )
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True  # to save it


def _check_secant(accelerator: Accelerator, args: TrainingArguments) -> None:
    """What its first step would refuse."""
    engine = engine_name(accelerator)
    if engine.startswith("DeepSpeed"):
        why = "under DeepSpeed, whose engine keeps the gradients; use DDP or FSDP2"
    elif engine == "FSDP1":
        why = "under FSDP1, which hides gradients; set fsdp_version: 2 in its configuration"
    elif accelerator.mixed_precision == "fp16":
        why = "with fp16, which scales the loss by a number that changes; use bf16"
    else:
        return
    raise UsageError(f"--optim {args.optim} cannot measure {why}")


def engine_name(accelerator: Accelerator) -> str:
    """What has to be the same for a checkpoint to be read."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"DeepSpeed ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return f"FSDP{accelerator.state.fsdp_plugin.fsdp_version}"
    return "DDP" if accelerator.num_processes > 1 else "none"


def cast_around(model: nn.Module) -> None:
    """Under DeepSpeed the model itself is in bf16 or fp16, and casting is left to us."""

    def cast(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        dtype = next(module.parameters()).dtype
        return tuple(x.to(dtype) for x in inputs)

    model.register_forward_pre_hook(cast)
    model.register_forward_hook(lambda module, inputs, logits: logits.float())
