"""Trains as tests.distributed.engines does, under DeepSpeed through accelerate; run on ranks.

    torchrun --nproc-per-node 2 -m tests.distributed.zero OUTPUT.json CASE...

A case is ENGINE/OPTIMIZER/LAYERS/FORM/WEIGHT_DECAY, ENGINE one of CONFIGS. What is written is what
engines.py writes, or {"error": text} for a case that is refused. Another is ENGINE/secant/LOOP, for
which the error and whether anything was trained before it are written.
"""

from __future__ import annotations

import logging
import os
import sys

os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_adalip import attach, create_optimizer, trainer_kwargs
from tests.distributed import engines
from tests.distributed.engines import ACCUMULATED, MAX_NORM, ROWS, STEPS, Net, Run
from tests.distributed.ranks import leave_out_deepspeeds_ops

CPU = {"device": "cpu"}
CONFIGS = {
    "zero0": {"zero_optimization": {"stage": 0}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3}},
    "zero2-offload": {"zero_optimization": {"stage": 2, "offload_optimizer": CPU}},
    "zero3-offload": {
        "zero_optimization": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}
    },
    "zero3-subgroups": {"zero_optimization": {"stage": 3, "sub_group_size": 100}},
    "zero2-round-robin": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "zero1-bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "zero3-bf16": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
}


def like(engine):
    """DeepSpeed 0.19.8 uses a parameter's last gradient again in a step in which it gets none, in
    ZeRO-3 and with an offloaded optimizer, whatever the optimizer is."""
    return "zero-steady" if "zero3" in engine or "offload" in engine else "zero"


def accelerator_for(engine):
    config = {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "gradient_accumulation_steps": ACCUMULATED,
        "gradient_clipping": MAX_NORM,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **CONFIGS[engine],
    }
    AcceleratorState._reset_state()
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    assert accelerator.distributed_type == DistributedType.DEEPSPEED
    return accelerator


def train(engine, *optimizer_options):
    torch.manual_seed(0)
    net = Net()
    optimizer = engines.make(net, *optimizer_options)
    accelerator = accelerator_for(engine)
    model, _ = accelerator.prepare(net, optimizer)
    share = engines.data_parallel_share(engine)
    dtype = next(model.parameters()).dtype
    losses, norms = [], []
    for step in range(STEPS):
        loss = 0.0
        for x, y, part, _ in engines.micro_batches(step, like(engine)):
            with accelerator.accumulate(model):
                part_loss = engines.loss_of(model(x[share].to(dtype), part).float(), y[share])
                accelerator.backward(part_loss * ACCUMULATED)  # which divides it, and steps
            loss += part_loss.item()
        losses.append(engines.mean_over_ranks(loss))
        norm = model.get_global_grad_norm()
        norms.append(norm if norm is None else float(norm))
    rates = optimizer.layer_learning_rates()
    with deepspeed.zero.GatheredParameters(list(net.parameters())):
        return Run(engines.weights_of(net), rates, losses, norms, 0)


class Classifier(Net):
    """As Trainer wants it."""

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(super().forward(x), labels)}


def trainer_of(engine, net, loop):
    args = TrainingArguments(
        "unused",
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        deepspeed=CONFIGS[engine]
        | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        | dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size"), "auto"),
    )
    x, y = engines.batch(0)
    rows = [{"x": row, "labels": label} for row, label in zip(x, y, strict=True)]
    trainer = Trainer(net, args, train_dataset=rows, **trainer_kwargs("secant-adamw"))
    if loop == "attached":
        attach(trainer)
    return trainer


def secant_loop(engine, net, loop):
    """What is to end in an error."""
    if loop in ("attached", "Trainer"):
        trainer_of(engine, net, loop).train()
        return
    accelerator = accelerator_for(engine)
    found = create_optimizer(net, "secant-adamw")
    model, optimizer = accelerator.prepare(net, found)
    share = engines.data_parallel_share(engine)
    x, y = engines.batch(0)

    def closure():
        loss = nn.functional.cross_entropy(model(x[share]), y[share])
        accelerator.backward(loss)
        return loss.detach()

    for _ in range(2):
        with accelerator.accumulate(model):
            if loop == "closure":
                found.compute_gradients(closure, accelerator.gradient_accumulation_steps)
            else:
                closure()
            optimizer.step()


def secant(engine, loop):
    AcceleratorState._reset_state()
    torch.manual_seed(0)
    net = Classifier() if loop in ("attached", "Trainer") else Net()
    before = [param.detach().clone() for param in net.parameters()]
    error = "not refused"
    try:
        secant_loop(engine, net, loop)
    except RuntimeError as refused:
        error = str(refused)
    with deepspeed.zero.GatheredParameters(list(net.parameters())):
        pairs = zip(before, net.parameters(), strict=True)
        return {"error": error, "trained": not all(torch.equal(p, q) for p, q in pairs)}


def case(engine, *optimizer_options):
    if optimizer_options[0] == "secant":
        return secant(engine, optimizer_options[1])
    try:
        found = train(engine, *optimizer_options)
    except RuntimeError as error:
        return {"error": str(error)}
    alone = engines.train_alone(like(engine), *optimizer_options)
    if None in found.norms:  # stage 0 clips, but does not tell the norm
        found = found._replace(norms=alone.norms)
    return engines.differences(found, lambda: alone)


def main():
    path, *cases = sys.argv[1:]
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    leave_out_deepspeeds_ops()
    deepspeed.init_distributed("gloo")
    found = {name: case(*name.split("/")) for name in cases}
    engines.finish(path, found)


if __name__ == "__main__":
    main()
