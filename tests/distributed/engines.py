"""Trains one small network under an engine and on one process; run by torchrun from the tests.

    torchrun --nproc-per-node 2 -m tests.distributed.engines OUTPUT.json ENGINE OPTIMIZER...

Rank 0 writes, for every optimizer and `layers`, the largest relative difference of S and the
largest difference of a parameter from one process that sees the whole batch, whether S and the
norms are equal on all ranks bit for bit, and the collectives of a step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from hf_adalip import create_optimizer

STEPS = 20


class Net(nn.Module):
    """Shapes that do not divide evenly, a shard that is empty on some ranks, an unused layer."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(7, 13)
        self.norm = nn.LayerNorm(13)
        self.b = nn.Linear(13, 8)
        self.c = nn.Linear(8, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(3))
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        x = torch.tanh(self.b(self.norm(torch.tanh(self.a(x)))))
        return self.c(x) * self.scale


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 7, generator=generator)
    return x, torch.randint(0, 3, (8,), generator=generator)


def wrap(engine, net):
    """The network under an engine, and whether ranks share the batch out among them."""
    world = dist.get_world_size()
    if engine == "ddp":
        return DistributedDataParallel(net, find_unused_parameters=True), True
    if engine in ("fsdp2", "fsdp2-no-reshard", "fsdp2-bf16-reduce"):
        options = {"reshard_after_forward": engine != "fsdp2-no-reshard"}
        if engine == "fsdp2-bf16-reduce":
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.float32, reduce_dtype=torch.bfloat16
            )
        fully_shard(net.a, **options)
        return fully_shard(net, **options), True
    if engine == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(net.a, mesh=mesh)
        return fully_shard(net, mesh=mesh), True
    plan = {"b": ColwiseParallel(), "c": RowwiseParallel()}
    if engine == "tp":
        return parallelize_module(net, init_device_mesh("cpu", (world,)), plan), False
    assert engine == "fsdp2-tp"
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(net, mesh["tp"], plan)
    return fully_shard(net, mesh=mesh["dp"]), True


def train(engine, name, layers):
    torch.manual_seed(0)
    net, split = Net(), False
    if engine is not None:
        net, split = wrap(engine, net)
    optimizer = create_optimizer(net, name, lr=1e-2, layers=layers, weight_decay=0.01)
    share = slice(None)
    if split:
        share = data_parallel_share(engine)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[share]), y[share]).backward()
        if step == STEPS - 1 and engine is not None:
            with CommDebugMode() as seen:
                optimizer.step()
            return net, optimizer, seen.get_total_counts()
        optimizer.step()
    return net, optimizer, 0


def data_parallel_share(engine):
    world, rank = dist.get_world_size(), dist.get_rank()
    if engine == "fsdp2-tp":
        world, rank = world // 2, rank // 2
    size = 8 // world
    return slice(rank * size, (rank + 1) * size)


def compare(engine, name, layers):
    net, optimizer, collectives = train(engine, name, layers)
    alone, reference, _ = train(None, name, layers)
    rates = {
        key.removeprefix("module.").replace("module", "(root)"): rate  # DDP's own name for the root
        for key, rate in optimizer.layer_learning_rates().items()
    }
    # Engines give an unused layer zeros or nothing; either way its S stays where it was.
    expected = reference.layer_learning_rates()
    assert set(expected) <= set(rates)
    assert all(rate.scale == 1.0 for key, rate in rates.items() if key not in expected)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, rates)
    pairs = zip(net.parameters(), alone.parameters(), strict=True)
    return {
        "S": max(abs(rates[key].scale / rate.scale - 1) for key, rate in expected.items()),
        "parameters": max((whole(p) - q).abs().max().item() for p, q in pairs),
        "same_on_all_ranks": all(other == rates for other in everyone),
        "collectives": collectives,
    }


def whole(param):
    return param.full_tensor() if hasattr(param, "full_tensor") else param


def main():
    path, engine, *names = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {
        f"{name}/{layers}": compare(engine, name, layers)
        for name in names
        for layers in ("tensor", "module")
    }
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
