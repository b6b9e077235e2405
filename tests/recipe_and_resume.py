"""Runs a recipe, and again from its first checkpoint; started by `accelerate launch`, or as by it.

    accelerate launch --config_file CONFIG tests/recipe_and_resume.py FOLDER RECIPE [its options]

The runs write to FOLDER/whole and FOLDER/resumed. accelerate has FSDP on GPUs only: here its choice
of the device is overridden, and all else, `fully_shard` on gloo included, is what it does with the
configuration.
"""

from __future__ import annotations

import os
import runpy
import sys

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

from tests.distributed.ranks import leave_out_deepspeeds_ops


def run(recipe: str, *options: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    sys.argv = [recipe, *options]
    try:
        runpy.run_path(recipe, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def main() -> None:
    folder, recipe, *options = sys.argv[1:]
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        dist.init_process_group("gloo")
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        leave_out_deepspeeds_ops()
    Accelerator.end_training = lambda self: None  # which ends the process group
    run(recipe, *options, f"--output_dir={folder}/whole")
    run(
        recipe,
        *options,
        f"--output_dir={folder}/resumed",
        f"--resume_from_checkpoint={folder}/whole/epoch_0",
    )
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
