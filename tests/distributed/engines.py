"""Trains one small network under engines and on one process; run on ranks from the tests.

    torchrun --nproc-per-node 2 -m tests.distributed.engines OUTPUT.json CASE...

A case is ENGINE/OPTIMIZER/LAYERS/FORM, FORM one of `FORMS`. Rank 0 writes, for every case, the
largest relative differences from one process that sees the whole batch (of the layers' S and
parameters, of losses and total gradient norms), whether S and the norms are equal on all ranks bit
for bit, and the all-reduces of a step of the optimizer (null where the step is compiled).
"""

from __future__ import annotations

import copy
import gc
import json
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from hf_adalip import create_optimizer
from hf_adalip.optim.names import plain_names
from tests.optim.cases import bare_step

STEPS, ACCUMULATED, ROWS = 50, 2, 8
MAX_NORM = 0.5  # below the gradient norm of some steps, and above that of others


class Sometimes(nn.Linear):
    """Part 0 uses all of it, part 1 the weight."""

    def forward(self, x, part):
        return nn.functional.linear(x, self.weight, self.bias if part == 0 else None)


class Net(nn.Module):
    """Shapes that do not divide evenly, a shard that is empty on some ranks, a frozen layer, one
    that is never used, and one that gets all, half or nothing of its gradients."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(7, 13)
        self.norm = nn.LayerNorm(13)
        self.b = nn.Linear(13, 8)
        self.c = nn.Linear(8, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(3))
        self.unused = nn.Linear(3, 3)
        self.sometimes = Sometimes(13, 13)
        self.frozen = nn.Linear(7, 13).requires_grad_(False)

    def forward(self, x, part=0):
        x = torch.tanh(self.a(x) + self.frozen(x))
        if part < 2:
            x = x + self.sometimes(x, part)
        x = torch.tanh(self.b(self.norm(x)))
        return self.c(x) * self.scale


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 7, generator=generator)
    return x, torch.randint(0, 3, (ROWS,), generator=generator)


def wrap(engine, net):
    """The network under an engine, and whether ranks share the batch out among them."""
    world = dist.get_world_size()
    if engine.startswith("ddp"):
        static = engine == "ddp-static"
        return DistributedDataParallel(
            net,
            find_unused_parameters=not static,
            static_graph=static,
            gradient_as_bucket_view=static,
        ), True
    if engine in FSDP1:
        options = {
            "sharding_strategy": FSDP1[engine],
            "use_orig_params": True,
            "device_id": torch.device("cpu"),
        }
        if FSDP1[engine] is ShardingStrategy.HYBRID_SHARD:
            options["device_mesh"] = init_device_mesh("cpu", (2, world // 2))
        net.sometimes = FullyShardedDataParallel(net.sometimes, **options)
        return FullyShardedDataParallel(net, **options), True
    if engine in FSDP2:
        fully_shard(net.sometimes, **FSDP2[engine])
        return fully_shard(net, **FSDP2[engine]), True
    if engine == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(net.a, mesh=mesh)
        return fully_shard(net, mesh=mesh), True
    plan = {"b": ColwiseParallel(), "c": RowwiseParallel()}
    if engine in ("tp", "tp-sequence"):
        mesh = init_device_mesh("cpu", (world,))
        if engine == "tp-sequence":  # the norm's gradients are partial sums
            rows = {"input_layouts": Replicate(), "desired_input_layouts": Shard(0)}
            parallelize_module(net.norm, mesh, PrepareModuleInput(use_local_output=False, **rows))
            parallelize_module(net.norm, mesh, SequenceParallel(sequence_dim=0))
            plan["b"] = ColwiseParallel(input_layouts=Shard(0))
        return parallelize_module(net, mesh, plan), False
    assert engine == "fsdp2-tp"
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(net, mesh["tp"], plan)
    return fully_shard(net, mesh=mesh["dp"]), True


FSDP1 = {
    "fsdp1": ShardingStrategy.FULL_SHARD,
    "fsdp1-grad-op": ShardingStrategy.SHARD_GRAD_OP,
    "fsdp1-hybrid": ShardingStrategy.HYBRID_SHARD,
    "fsdp1-no-shard": ShardingStrategy.NO_SHARD,
}
FSDP2 = {
    "fsdp2": {},
    "fsdp2-compiled": {},
    "fsdp2-no-reshard": {"reshard_after_forward": False},
    "fsdp2-offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "fsdp2-bf16": {
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    },
    "fsdp2-bf16-reduce": {
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.bfloat16)
    },
}
STATIC = ("ddp-static", "fsdp2-compiled")
"""Engines whose graph has to stay as it is. (A compiled step could do otherwise; it is a graph for
each set of layers.) And torch 2.15 cannot leave out the synchronisation of a static DDP's first
backward pass: an internal assertion fails."""

STEADY = (*STATIC, "zero-steady")
"""Trainings in which all layers get their gradients in all steps."""

LIKE = {engine: engine for engine in (*STATIC, "fsdp2-bf16")} | dict.fromkeys(FSDP1, "fsdp1")
"""Engines that do not give a plain run's gradients."""


FORMS = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "history-bfloat16": {"foreach": True, "history": "bfloat16"},
    "sketch": {"foreach": True, "history": "sketch", "sketch_size": 32},  # of three weights
    "fused-sketch-float64": {"fused": True, "history": "sketch", "sketch_size": 32},
}


class Run(NamedTuple):
    """What a training leaves behind."""

    weights: dict[str, torch.Tensor]  # of each layer
    rates: dict
    losses: list[float]
    norms: list[float]  # of the whole gradient, before clipping
    collectives: int | None  # all-reduces of the last step of the optimizer


def make(net, name, layers, form, weight_decay="0.01"):
    """RMSProp's first steps are ten times as long as its learning rate (v starts at zero): at 1e-2,
    roundings grow to 8e-7 of the parameters in 50 steps, and to more in what S is made of."""
    return create_optimizer(
        net,
        name,
        lr=1e-3 if name.startswith("rms") else 1e-2,
        layers=(lambda name: "all") if layers == "all" else layers,
        weight_decay=float(weight_decay),
        **FORMS[form],
    )


def train(engine, *optimizer_options):
    torch.manual_seed(0)
    net, split = wrap(engine, Net())
    optimizer = make(net, *optimizer_options)
    take_step, compiled = optimizer.step, engine == "fsdp2-compiled"
    if compiled:
        take_step = torch.compile(bare_step(optimizer), backend="eager", fullgraph=True)
    share = data_parallel_share(engine) if split else slice(None)
    losses, norms, seen = [], [], CommDebugMode()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = 0.0
        for x, y, part, last in micro_batches(step, engine):
            with synchronised(net, last or (engine in STATIC and step == 0)):
                part_loss = loss_of(net(x[share], part), y[share])
                part_loss.backward()
            loss += part_loss.item()
        losses.append(mean_over_ranks(loss))
        norms.append(clip_under(net, MAX_NORM))
        if step == STEPS - 1 and not compiled:  # which a debug mode excludes
            with seen:
                take_step()
        else:
            take_step()
    rates = optimizer.layer_learning_rates()
    return Run(weights_of(net), rates, losses, norms, None if compiled else seen.get_total_counts())


def give_zeros(net, engine):
    """Makes zeros of missing gradients where the engine does: FSDP1 in a unit that has any."""
    mine = set(net.sometimes.parameters())
    everything = [p for p in net.parameters() if p.requires_grad]
    units = {
        "fsdp1": [[p for p in everything if p in mine], [p for p in everything if p not in mine]],
        "zero": [everything],
        "zero-steady": [everything],
    }.get(engine, [])
    for unit in units:
        if any(p.grad is not None for p in unit):
            for p in unit:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad


@cache
def train_alone(like, *optimizer_options):
    """On one process, which treats its gradients as an engine does.

    Like "fsdp2-bf16": as many shares of the batch as there are ranks, one after the other, each
    with parameters and gradients in bf16, the gradients added up in float32.
    """
    bf16_shares = dist.get_world_size() if like == "fsdp2-bf16" else None
    torch.manual_seed(0)
    net = Net()
    optimizer = make(net, *optimizer_options)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = 0.0
        for x, y, part, _ in micro_batches(step, like):
            if not bf16_shares:
                part_loss = loss_of(net(x, part), y)
                part_loss.backward()
                loss += part_loss.item()
                continue
            for xs, ys in zip(x.chunk(bf16_shares), y.chunk(bf16_shares), strict=True):
                half = copy.deepcopy(net).bfloat16()
                half.zero_grad()
                part_loss = loss_of(half(xs.bfloat16(), part), ys)
                part_loss.backward()
                loss += part_loss.item() / bf16_shares
                for p, q in zip(net.parameters(), half.parameters(), strict=True):
                    if q.grad is not None:
                        grad = q.grad.float() / bf16_shares
                        p.grad = grad if p.grad is None else p.grad + grad
        give_zeros(net, like)
        losses.append(loss)
        norms.append(clip(net.parameters(), MAX_NORM))
        optimizer.step()
    assert min(norms) < MAX_NORM < max(norms)
    return Run(weights_of(net), optimizer.layer_learning_rates(), losses, norms, 0)


def weights_of(net):
    """All numbers of each layer. Not of each tensor: one near zero, as a bias can be, is off by
    more than its own rounding, under torch's own RMSprop as well."""
    found = {}
    whole_net = nullcontext()
    if isinstance(net, FullyShardedDataParallel):
        whole_net = FullyShardedDataParallel.summon_full_params(net, writeback=False)
    with whole_net:
        names, params = zip(*net.named_parameters(), strict=True)
        for name, p in zip(plain_names(names), params, strict=True):
            found.setdefault(name.rpartition(".")[0], []).append(
                whole(p).detach().flatten().clone()
            )
    return {layer: torch.cat(tensors) for layer, tensors in found.items()}


def loss_of(logits, y):
    return nn.functional.cross_entropy(logits, y) / ACCUMULATED


def micro_batches(step, engine):
    """x, y, which gradients `sometimes` gets in this step, and whether it is the step's last."""
    part = 0 if engine in STEADY else step % 3
    for i in range(ACCUMULATED):
        yield *batch(step * ACCUMULATED + i), part, i == ACCUMULATED - 1


def synchronised(net, last):
    """The context of a forward and backward pass whose gradients are reduced only if it is the
    last one of its step."""
    if isinstance(net, (DistributedDataParallel, FullyShardedDataParallel)) and not last:
        return net.no_sync()
    if hasattr(net, "set_requires_gradient_sync"):
        net.set_requires_gradient_sync(last)
    return nullcontext()


def clip_under(net, max_norm):
    if isinstance(net, FullyShardedDataParallel):
        return net.clip_grad_norm_(max_norm).item()
    return clip(net.parameters(), max_norm)


def clip(parameters, max_norm):
    """torch's clip_grad_norm_, which takes gradients of one mesh at a time."""
    meshes = {}
    for p in parameters:
        if p.grad is not None:
            meshes.setdefault(getattr(p.grad, "device_mesh", None), []).append(p)
    if len(meshes) == 1:
        (params,) = meshes.values()
        return whole(nn.utils.clip_grad_norm_(params, max_norm)).item()
    norms = [whole(nn.utils.get_total_norm([p.grad for p in x])) for x in meshes.values()]
    total = nn.utils.get_total_norm(norms)
    for params in meshes.values():
        nn.utils.clip_grads_with_norm_(params, max_norm, total)
    return total.item()


def data_parallel_share(engine):
    world, rank = dist.get_world_size(), dist.get_rank()
    if engine == "fsdp2-tp":
        world, rank = world // 2, rank // 2
    size = ROWS // world
    return slice(rank * size, (rank + 1) * size)


def mean_over_ranks(value):
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def compare(engine, *optimizer_options):
    wide = optimizer_options[2].endswith("-float64")
    torch.set_default_dtype(torch.float64 if wide else torch.float32)
    found = train(engine, *optimizer_options)
    return differences(found, lambda: train_alone(LIKE.get(engine, ""), *optimizer_options))


def differences(found, train_alone):
    """On rank 0, which alone trains what the others would only repeat."""
    rates = found.rates
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, rates)
    if dist.get_rank() != 0:
        return None
    alone = train_alone()
    # Engines give an unused layer zeros or nothing; either way its S stays where it was.
    assert set(alone.rates) <= set(rates)
    assert all(rate.scale == 1.0 for key, rate in rates.items() if key not in alone.rates)
    return {
        "S": max(abs(rates[key].scale / rate.scale - 1) for key, rate in alone.rates.items()),
        "parameters": max(
            ((found.weights[layer] - weights).norm() / weights.norm()).item()
            for layer, weights in alone.weights.items()
        ),
        "losses": difference(found.losses, alone.losses),
        "norms": difference(found.norms, alone.norms),
        "same_on_all_ranks": all(other == rates for other in everyone),
        "collectives": found.collectives,
    }


def difference(found, expected):
    """The largest relative one."""
    return max(abs(x / y - 1) for x, y in zip(found, expected, strict=True))


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def finish(path, found):
    """Writes what was found, and ends the processes together."""
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(found))
    leave()


def leave():
    """Ends the group of the processes, together."""
    gc.collect()  # models in reference cycles hold the group: they must not outlive it
    dist.barrier()
    dist.destroy_process_group()


def main():
    path, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {case: compare(*case.split("/")) for case in cases}
    finish(path, found)


if __name__ == "__main__":
    main()
