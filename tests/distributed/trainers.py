"""Trains with transformers.Trainer, saves, and goes on from what was saved; run on ranks.

    torchrun --nproc-per-node 2 -m tests.distributed.trainers save FOLDER
    torchrun --nproc-per-node 1 -m tests.distributed.trainers load FOLDER

Global batches are the same on any number of ranks. Rank 0 writes to FOLDER/MODE.pt a dict, with
for each training a dict of the layers' parameters and S and of the losses, and for each attempt
at what is refused the error's text.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from deepspeed.checkpoint import ds_to_universal
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_adalip import AdamLip, attach, register, trainer_kwargs
from hf_adalip.monitor import layerwise
from tests.distributed import engines, zero
from tests.distributed.engines import ACCUMULATED, MAX_NORM, ROWS, Net, batch
from tests.distributed.ranks import leave_out_deepspeeds_ops

SAVED, END = 4, 8

WAYS = ("adamlip", "--optim")
TRAINER = [  # engine, way
    ("ddp", "adamlip"),
    ("zero1", "adamlip"),
    ("zero2", "--optim"),
    ("zero3", "adamlip"),
    ("zero3-init", "--optim"),
]
ACCELERATE = ["zero1", "zero3"]


class Classifier(Net):
    def __init__(self):
        super().__init__()
        del self.unused

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(super().forward(x), labels)}


def rows():
    for i in range(END * ACCUMULATED):
        for x, y in zip(*batch(i), strict=True):
            yield {"x": x, "labels": y}


def reset():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def arguments(folder, engine, **options):
    reset()
    configs = zero.CONFIGS | {
        "zero3-init": zero.CONFIGS["zero3"],
        "zero3-universal": zero.CONFIGS["zero3"] | {"checkpoint": {"load_universal": True}},
    }
    if engine.startswith("zero"):
        auto = ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
        auto = dict.fromkeys((*auto, "train_micro_batch_size_per_gpu"), "auto")
        options["deepspeed"] = auto | configs[engine]
    return TrainingArguments(
        str(folder),
        max_steps=END,
        save_steps=SAVED,
        per_device_train_batch_size=ROWS // dist.get_world_size(),
        gradient_accumulation_steps=ACCUMULATED,
        max_grad_norm=MAX_NORM,
        use_cpu=True,
        seed=1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        **options,
    )


def trainer(folder, engine, way):
    """With the learning rate from Trainer's scheduler, which ends at 0."""
    given, options = {}, {}
    if way == "--optim":
        register()
        given = {"optim": "rmslip", "optim_args": "layers=tensor"}
        given |= {"weight_decay": 0.01, "learning_rate": 1e-2}
    else:
        options = trainer_kwargs(way, lr=1e-2)
    args = arguments(folder, engine, **given)
    torch.manual_seed(0)
    if engine == "zero3-init":  # as from_pretrained does it
        with deepspeed.zero.Init(config_dict_or_path=args.hf_deepspeed_config.config):
            net = Classifier()
    else:
        net = Classifier()
    made = Trainer(net, args, train_dataset=list(rows()), **options)
    attach(made)
    return made


def found(net, optimizer, losses=()):
    with deepspeed.zero.GatheredParameters(list(net.parameters())):
        weights = engines.weights_of(net)
    return {
        "parameters": weights,
        "S": layerwise(optimizer).layer_learning_rates(),
        "losses": list(losses),
    }


def train(folder, engine, way, checkpoint=None):
    run = trainer(folder, engine, way)
    run.train(resume_from_checkpoint=checkpoint)
    return found(run.model, run.optimizer, [entry["loss"] for entry in run.state.log_history[:END]])


def refused(attempt, *arguments):
    try:
        attempt(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def warned(attempt, *arguments):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        attempt(*arguments)
    return [str(one.message) for one in seen]


def dropped_optimizer(folder, engine):
    net = Classifier()
    optimizers = (AdamLip(net.parameters(), lr=1e-2), None)
    attach(Trainer(net, arguments(folder, engine), optimizers=optimizers))


def to_universal(checkpoint):
    """As `python -m deepspeed.checkpoint.ds_to_universal` and the hand of the user make it."""
    if dist.get_rank() == 0:
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=f"{checkpoint}/global_step{SAVED}",
                output_folder=f"{checkpoint}/universal",
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=False,
            )
        )
        with open(f"{checkpoint}/latest_universal", "w") as file:
            file.write("universal")
    dist.barrier()
    return checkpoint


class Accelerated:
    """A loop of one's own with accelerate."""

    def __init__(self, engine):
        reset()
        torch.manual_seed(0)
        self.net = Net()
        self.optimizer = engines.make(self.net, "adamlip", "module", "foreach", 0)
        self.accelerator = zero.accelerator_for(engine)
        self.model, _ = self.accelerator.prepare(self.net, self.optimizer)
        self.share = engines.data_parallel_share(engine)

    def train(self, start, end):
        for step in range(start, end):
            for x, y, *_ in engines.micro_batches(step, "zero-steady"):
                with self.accelerator.accumulate(self.model):
                    loss = nn.functional.cross_entropy(self.model(x[self.share]), y[self.share])
                    self.accelerator.backward(loss)
        return found(self.net, self.optimizer)


def through_accelerate(folder, engine):
    run = Accelerated(engine)
    run.train(0, SAVED)
    run.accelerator.save_state(folder)
    uninterrupted = run.train(SAVED, END)
    again = Accelerated(engine)
    again.accelerator.load_state(folder)
    return uninterrupted, again.train(SAVED, END)


def save(folder):
    def saved(engine, way="adamlip"):
        return f"{folder}/{engine} {way}/checkpoint-{SAVED}"

    other = f"{folder}/other"
    results = {}
    for case in TRAINER:
        results[case] = train(f"{folder}/{' '.join(case)}", *case)
        results[(*case, "resumed")] = train(other, *case, saved(*case))
    for engine in ACCELERATE:
        case = (engine, "accelerate")
        results[case], results[(*case, "resumed")] = through_accelerate(
            f"{folder}/{engine}", engine
        )
    results["zero1 on zero2"] = train(other, "zero2", "adamlip", saved("zero1"))
    results["zero1 on zero3"] = refused(train, other, "zero3", "adamlip", saved("zero1"))
    results["zero3 on zero1"] = refused(train, other, "zero1", "adamlip", saved("zero3"))
    universal = to_universal(saved("zero3"))
    results["universal"] = refused(train, other, "zero3-universal", "adamlip", universal)
    results["zero1 on ddp"] = warned(train, other, "ddp", "adamlip", saved("zero1"))
    results["ddp on ddp"] = warned(train, other, "ddp", "adamlip", saved("ddp"))
    results["optimizers="] = refused(dropped_optimizer, other, "zero1")
    return results


def load(folder):
    checkpoint = f"{folder}/{{}} adamlip/checkpoint-{SAVED}"
    other = f"{folder}/other"
    results = {way: train(f"{folder}/alone", "alone", way) for way in WAYS}
    results["ddp"] = train(other, "alone", "adamlip", checkpoint.format("ddp"))
    for engine in ("zero1", "zero3"):
        arguments = (other, engine, "adamlip", checkpoint.format(engine))
        results[engine] = refused(train, *arguments)
    return results


def main():
    mode, folder = sys.argv[1:]
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    leave_out_deepspeeds_ops()
    deepspeed.init_distributed("gloo")
    results = {"save": save, "load": load}[mode](folder)
    if dist.get_rank() == 0:
        torch.save(results, f"{folder}/{mode}.pt")
    engines.leave()


if __name__ == "__main__":
    main()
