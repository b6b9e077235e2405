"""Secant on several ranks; run on ranks from the tests.

    torchrun --nproc-per-node 2 -m tests.distributed.secant OUTPUT.json FOLDER

Rank 0 writes, for each case, what each rank found. Rates are as hex, to be compared bit for bit.
"""

from __future__ import annotations

import math
import os
import sys
from contextlib import nullcontext

import accelerate
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from transformers import Trainer, TrainingArguments

from hf_adalip import attach, create_optimizer, trainer_kwargs
from hf_adalip.monitor import secant
from tests.distributed import resharding
from tests.distributed.engines import (
    Net,
    batch,
    data_parallel_share,
    finish,
    synchronised,
    whole,
    wrap,
)

STEPS = 13
SAVED = (10, 9)  # where a measurement is due, and where none is
WAYS = ("sharded", "flattened", "full", "accelerate", "accelerate full")


class Run:
    """Net under an engine, with micro-batches of which all but the last are not reduced.

    Args:
        engine: of tests.distributed.engines, or "alone".
        micro: micro-batches of a step.
        spoiled: the call of the closure in which the last rank's gradient gets an inf.
        autocast: whether it computes in bf16.
    """

    def __init__(self, engine, base="adamw", micro=1, spoiled=None, autocast=False, way=""):
        torch.manual_seed(0)
        self.net, self.accelerator, self.way = Net(), None, way
        if engine != "alone" and not way.startswith("accelerate"):
            self.net, _ = wrap(engine, self.net)
        self.optimizer = self.secant = create_optimizer(self.net, f"secant-{base}", every=3)
        if way.startswith("accelerate"):
            self.accelerator = resharding.accelerator_for(engine, way)
            self.net, self.optimizer = self.accelerator.prepare(self.net, self.optimizer)
        self.inner = getattr(self.net, "module", self.net)
        self.engine, self.micro, self.spoiled = engine, micro, spoiled
        self.share = slice(None) if engine == "alone" else data_parallel_share(engine)
        self.calls, self.due = 0, []
        self.autocast = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        self.rates = []

    def closure_of(self, index, reduced):
        x, y = batch(index)

        def closure():
            with synchronised(self.net, reduced):
                with self.autocast:
                    logits = self.net(x[self.share])
                    loss = nn.functional.cross_entropy(logits, y[self.share]) / self.micro
                loss.backward()
            if self.calls == self.spoiled and dist.get_rank() == dist.get_world_size() - 1:
                grad = self.inner.b.weight.grad
                (grad.to_local() if hasattr(grad, "to_local") else grad).view(-1)[-1] = math.inf
            self.calls += 1
            return loss.detach()

        return closure

    def train(self, start=0, end=STEPS):
        for step in range(start, end):
            self.due.append(self.secant.due)
            for i in range(self.micro):
                last = i == self.micro - 1
                # FSDP2 must not keep back what is measured
                measured = self.secant.due and hasattr(self.net, "set_requires_gradient_sync")
                closure = self.closure_of(step * self.micro + i, last or measured)
                self.secant.compute_gradients(closure, self.micro)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.rates.append(self.secant.rate)
        return self

    def found(self):
        weights = torch.cat([whole(p).detach().flatten() for p in self.net.parameters()])
        return {
            "rates": [rate.hex() for rate in self.rates],
            "r": [probe.r.hex() for probe in self.secant.probes],
            "steps": [probe.step for probe in self.secant.probes],
            "weights": weights.double().tolist(),
            "due": self.due,
        }


def resumed(engine, way, folder, step):
    """Through torch.distributed.checkpoint, or accelerate's save_state."""
    run = Run(engine, way=way)
    run.folder = f"{folder}/{engine} {way} {step}"
    get_optimizer_state_dict(run.net, run.optimizer)  # of all, also of what gets no gradient
    run.train(0, step)
    resharding.Run.save(run)
    dist.barrier()
    run.train(step, STEPS)
    again = Run(engine, way=way)
    again.folder = run.folder
    resharding.Run.load(again)
    again.train(step, STEPS)
    again.rates, again.due = run.rates[:step] + again.rates, run.due[:step] + again.due
    again.secant.probes[:0] = [probe for probe in run.secant.probes if probe.step < step]
    return run.found(), again.found()


def refusal(engine, **options):
    try:
        Run(engine, **options).train(0, 1)
    except RuntimeError as error:
        return str(error)
    return "not refused"


def kept_back():
    run = Run("fsdp2")
    run.net.set_requires_gradient_sync(False)
    try:
        run.secant.compute_gradients(run.closure_of(0, False), 2)
    except RuntimeError as error:
        return str(error)
    return "not refused"


def through_accelerate(micro):
    """Accelerator.prepare under DDP."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=micro)
    torch.manual_seed(0)
    net = Net()
    net.unused, net.sometimes = None, nn.Linear(13, 13)
    net.sometimes.forward = lambda x, part=0: nn.Linear.forward(net.sometimes, x)
    found = create_optimizer(net, "secant-adamw", every=3)
    model, optimizer = accelerator.prepare(net, found)
    share, rates = data_parallel_share("ddp"), []
    for index in range(STEPS * micro):
        x, y = batch(index)

        def closure(x=x, y=y):
            loss = nn.functional.cross_entropy(model(x[share]), y[share])
            accelerator.backward(loss)
            return loss.detach()

        with accelerator.accumulate(model):
            found.compute_gradients(closure, micro)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            rates.append(found.rate.hex())
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    return {"rates": rates, "weights": weights.double().tolist(), "wrapped": type(model).__name__}


class Classifier(Net):
    """As Trainer wants it."""

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(super().forward(x), labels)}


def choose_fsdp2():
    """For what comes after it: accelerate has FSDP on GPUs only, unless it is told otherwise."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
        "ACCELERATE_TORCH_DEVICE": "cpu",
    }
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def through_trainer(folder, micro):
    """With `attach`."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    args = TrainingArguments(
        f"{folder}/trainer",
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=micro,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    torch.manual_seed(0)
    rows = [{"x": x, "labels": y} for i in range(STEPS) for x, y in zip(*batch(i), strict=True)]
    trainer = Trainer(
        Classifier(), args, train_dataset=rows, **trainer_kwargs("secant-adamw", every=3)
    )
    attach(trainer)
    trainer.train()
    weights = torch.cat([whole(p.detach()).flatten() for p in trainer.model.parameters()])
    probes = secant(trainer.optimizer).probes
    return {
        "rates": [probe.rate.hex() for probe in probes],
        "weights": weights.double().tolist(),
        "wrapped": type(trainer.model_wrapped).__name__,
    }


def cases(folder):
    for base in ("adamw", "sgd"):
        yield f"alone, {base}", Run("alone", base).train().found()
        for engine in ("ddp", "fsdp2"):
            yield f"{engine}, {base}", Run(engine, base).train().found()
    yield "alone, accumulated", Run("alone", micro=2).train().found()
    for engine in ("ddp", "ddp-static", "fsdp2"):
        if engine != "ddp-static":
            yield f"{engine}, accumulated", Run(engine, micro=2).train().found()
        yield f"{engine}, bf16", Run(engine, autocast=True).train().found()
    for engine in ("ddp", "fsdp2"):
        yield f"{engine}, bad start", refusal(engine, spoiled=0)
        calls = Run(engine).train(0, 2).calls  # the next step measures, and raises the rate
        for what, call in (("before", calls), ("after", calls + 1)):
            yield f"{engine}, spoiled {what}", Run(engine, spoiled=call).train().found()
    for way in WAYS:
        for step in SAVED:
            one, again = resumed("fsdp2", way, folder, step)
            yield f"fsdp2 {way} {step}", one
            yield f"fsdp2 {way} {step}, resumed", again
    yield "fsdp1", refusal("fsdp1")
    for micro in (1, 2):
        yield f"accelerate, {micro}", through_accelerate(micro)
        yield f"Trainer, {micro}", through_trainer(folder, micro)
    yield "fsdp2, kept back", kept_back()
    choose_fsdp2()
    for micro in (1, 2):
        yield f"Trainer with FSDP2, {micro}", through_trainer(folder, micro)


def main():
    path, folder = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = dict(cases(folder))
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    finish(path, everyone)


if __name__ == "__main__":
    main()
