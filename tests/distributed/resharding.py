"""Saves training states on some ranks, or goes on from them; run on ranks from the tests.

    torchrun --nproc-per-node 2 -m tests.distributed.resharding save FOLDER
    torchrun --nproc-per-node 4 -m tests.distributed.resharding load FOLDER

Both train to the same step; rank 0 writes the whole parameters and S of each of `CASES` to
FOLDER.MODE.RANKS.pt.
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    PartialState,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from hf_adalip import create_optimizer
from hf_adalip.monitor import layerwise
from tests.distributed.engines import Net, batch, data_parallel_share, leave, whole, wrap

SAVED, END = 6, 12

CASES = [  # engine, what saves and loads, optimizer
    ("fsdp2", "sharded", "adamlip"),
    ("fsdp2", "sharded", "adamlip sketch"),
    ("fsdp2", "sharded", "lip-nadam"),
    ("fsdp2", "flattened", "rmslipu"),
    ("fsdp2", "full", "adamlip"),
    ("fsdp2", "full", "lip-nadam"),
    ("ddp", "full", "adalipu"),
    ("ddp", "accelerate", "adamlip"),
    ("fsdp2", "accelerate", "adamlip"),
    ("fsdp2", "accelerate full", "adalip"),
]


def distributed_options(way):
    """torch.distributed.checkpoint's; a full state is on rank 0, which hands it to the others."""
    full = way == "full"
    return StateDictOptions(
        full_state_dict=full,
        cpu_offload=full,
        flatten_optimizer_state_dict=way == "flattened",
    )


class Run:
    def __init__(self, engine, way, name, folder):
        self.way, self.folder = way, f"{folder}/{engine} {way} {name}"
        torch.manual_seed(0)
        self.net, self.accelerator = Net(), None
        if not way.startswith("accelerate"):
            self.net, _ = wrap(engine, self.net)
        name, *history = name.split()
        options = {"history": "sketch", "sketch_size": 32} if history else {}
        self.optimizer = create_optimizer(
            self.net, name, lr=1e-2, weight_decay=0.01, c="theoretical", **options
        )
        if way.startswith("accelerate"):
            self.accelerator = accelerator_for(engine, way)
            self.net, self.optimizer = self.accelerator.prepare(self.net, self.optimizer)
        self.share = data_parallel_share(engine)

    def train(self, start, end):
        for step in range(start, end):
            x, y = batch(step)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(x[self.share]), y[self.share]).backward()
            self.optimizer.step()

    def save(self):
        if self.accelerator:
            self.accelerator.save_state(self.folder)
            return
        options = distributed_options(self.way)
        model, state = get_state_dict(self.net, self.optimizer, options=options)
        if not options.full_state_dict:
            dcp.save({"model": model, "optimizer": state}, checkpoint_id=self.folder)
        elif dist.get_rank() == 0:
            torch.save((model, state), self.folder)

    def load(self):
        if self.accelerator:
            self.accelerator.load_state(self.folder)
            return
        options = distributed_options(self.way)
        model, state = {}, {}
        if not options.full_state_dict:
            model, state = get_state_dict(self.net, self.optimizer, options=options)
            # Into copies: dcp.load writes as it reads, and if it fails the run is to be as it was.
            model, state = copy.deepcopy((model, state))
            dcp.load({"model": model, "optimizer": state}, checkpoint_id=self.folder)
        else:
            options.broadcast_from_rank0 = True
            if dist.get_rank() == 0:
                model, state = torch.load(self.folder)
        # One by one: set_state_dict takes the empty model of the other ranks for none, and hangs.
        set_model_state_dict(self.net, model, options=options)
        set_optimizer_state_dict(self.net, self.optimizer, state, options=options)

    def found(self):
        parameters = [whole(p).detach().clone() for p in self.net.parameters()]
        rates = layerwise(self.optimizer).layer_learning_rates()
        return parameters, {
            layer.removeprefix("module."): rate.scale for layer, rate in rates.items()
        }


def accelerator_for(engine, way):
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[unused])
    kind = DistributedType.MULTI_CPU
    if engine == "fsdp2":  # which accelerate ignores on the CPU unless it is set by hand
        kind = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            state_dict_type="FULL_STATE_DICT" if way.endswith("full") else "SHARDED_STATE_DICT",
            auto_wrap_policy="NO_WRAP",
        )
    # AcceleratorState takes it from PartialState whenever one is made.
    PartialState().distributed_type = accelerator.state.distributed_type = kind
    return accelerator


def main():
    mode, folder = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for engine, way, name in CASES:
        run = Run(engine, way, name, folder)
        if mode == "save":
            # Makes the state by a step with zero gradients and lr = 0, which is to move no S; and
            # it is there for parameters that never get a gradient, which strict loading asks for.
            get_optimizer_state_dict(run.net, run.optimizer)
            run.train(0, SAVED)
            run.save()
        else:
            run.load()
        run.train(SAVED, END)
        results[f"{engine} {way} {name}"] = run.found()
        del run
    if dist.get_rank() == 0:
        torch.save(results, f"{folder}.{mode}.{dist.get_world_size()}.pt")
    leave()


if __name__ == "__main__":
    main()
